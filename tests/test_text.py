"""lib/text.py: captions become condition tokens and semantic graphs."""
import pytest
import torch

import hgm3
from lib import text


def worst(a, b):
    return float((a - b).abs().max())


def test_hashed_text():
    """The vector of a caption depends on the order of its words, not on punctuation, inflection or
    other captions."""
    def vector(caption):
        return text.caption_vectors([caption], 'hash')[0][0, 0]

    captions = ['a person walks then kicks', 'a person kicks then walks',
                'A person walks, then kicks.']
    c, role = text.caption_vectors(captions, 'hash')
    assert c.shape == (3, 1, 512)
    assert role.tolist() == [[1]] * 3
    walks, kicks, again = c[:, 0]
    assert torch.equal(walks, again)
    assert torch.equal(walks, vector(captions[0]))
    assert worst(walks, kicks) > 0.1
    assert abs(walks.norm() - 512 ** 0.5) < 1e-3
    assert torch.equal(vector('a person jogs'), vector('the person is jogging'))
    assert torch.equal(vector('raises arms'), vector('raising his arms'))
    assert worst(vector('a person jogs'), vector('a person jumps')) > 0.1


@pytest.mark.parametrize('caption, clauses', [
    ('a person walks forward, then kicks with the left leg',
     ['a person walks forward', 'kicks with the left leg']),
    ('he turns around and, after that, sits down before waving.',
     ['he turns around', 'sits down', 'waving']),
    ('First she runs; finally she stands', ['she runs', 'she stands']),
    ('a thenar andante', ['a thenar andante']),   # words, not parts of words
    (' , and then!', [])])
def test_clauses(caption, clauses):
    assert text.clauses(caption) == clauses


@pytest.mark.parametrize('mode, counts', [('sentence', [1, 1, 1]), ('clauses', [3, 2, 2])])
def test_condition_tokens(mode, counts):
    """The first condition token is the sentence, and a text that captions share is stored once."""
    captions = ['a man walks, then jumps', 'a man walks', 'jumps']
    vectors, index, role = text.encode_captions(captions, 'hash', mode)
    c, _ = text.caption_vectors(captions, 'hash', mode)
    assert torch.equal(c, vectors[index])
    assert torch.equal(role > 0, index > 0)
    assert torch.equal(c[:, :1], text.caption_vectors(captions, 'hash')[0])
    assert not vectors[0].any()
    assert role.sum(1).tolist() == counts
    assert len(vectors) == 1 + 3   # "a man walks", "jumps" and the long sentence
    if mode == 'clauses':
        assert index[0, 2] == index[2, 0]   # "jumps" as a clause and as a sentence
        index = text.encode_captions(['walks, ' * 100], 'hash', mode)[1]
        assert index.shape == (1, 1 + text.MOST_TOKENS)


def test_clip_tower_and_its_cache(tmp_path):
    """open_clip with random weights, so that nothing is downloaded."""
    open_clip = pytest.importorskip('open_clip', reason='open_clip_torch is not installed')
    torch.manual_seed(0)
    tower = text.clip_tower(pretrained=None)
    calls = []

    def counting_tower(captions):
        calls.append(len(captions))
        return tower(captions)

    def encode(captions):
        return text.caption_vectors(captions, 'clip', cache=str(tmp_path),
                                    tower=lambda device: counting_tower)[0]

    x = encode(['a person walks', 'a person runs', 'a person walks'])
    assert x.shape == (3, 1, 512)
    assert torch.equal(x[0], x[2])
    assert abs(x[0].norm() - 1) > 1e-2   # un-normalized, as in MoMask
    y = encode(['a person walks', 'a person jumps'])
    assert torch.equal(x[0], y[0])
    assert calls == [2, 1]               # only the new caption was encoded

    torch.manual_seed(0)
    whole = open_clip.create_model('ViT-B-32-quickgelu', pretrained=None).eval()
    long = 'a person, having run for a while, sits down on the floor and ' + 'waits and ' * 60
    captions = ['a person walks', long, '']
    ids = open_clip.get_tokenizer('ViT-B-32-quickgelu')(captions)
    with torch.no_grad():
        for n in (1, 3):   # the tower pads to its longest caption only
            assert worst(tower(captions[:n]), whole.encode_text(ids[:n])) < 1e-4


# -------------------------------------------------------------------------- semantic graphs (HGM3)

# graphs as a person would write them: verb(edge: phrase; ...) for each action, in order
GRAPHS = {
    # the toy set's grammar
    'someone/PRON wave/VERB with/ADP the/DET left/ADJ hand/NOUN slowly/ADV':
        'wave(ARG0: someone; ARG2: with the left hand; MNR: slowly)',
    'the/DET person/NOUN leap/VERB up/ADV and/CCONJ then/ADV jog/VERB ahead/ADV finally/ADV '
    'sit/VERB down/ADV':
        'leap(ARG0: the person; DIR: up) jog(TMP: then; DIR: ahead) sit(TMP: finally; DIR: down)',
    'a/DET person/NOUN raise/VERB both/DET hand/NOUN and/CCONJ after/ADP that/PRON bow/VERB':
        'raise(ARG0: a person; ARG1: both hand) bow(TMP: after that)',
    # HumanML3D's lines
    'a/DET man/NOUN kick/VERB something/PRON or/CCONJ someone/PRON with/ADP his/DET left/ADJ '
    'leg/NOUN':
        'kick(ARG0: a man; ARG1: something; ARG1: someone; ARG2: with his left leg)',
    'he/PRON is/AUX walk/VERB from/ADP the/DET door/NOUN to/ADP the/DET table/NOUN':
        'walk(ARG0: he; ARG3: from the door; ARG4: to the table)',
    'a/DET person/NOUN who/PRON sit/VERB stand/VERB up/ADV':
        'sit(ARG0: a person who) stand(DIR: up)',
    'a/DET figure/NOUN bend/VERB down/ADP while/SCONJ hold/VERB a/DET box/NOUN':
        'bend(ARG0: a figure; DIR: down) hold(ARG1: a box)',
    'a/DET man/NOUN wave/VERB and/CCONJ a/DET woman/NOUN bow/VERB':
        'wave(ARG0: a man) bow(ARG0: a woman)',
    'a/DET person/NOUN suddenly/ADV fall/VERB': 'fall(ARG0: a person; ADV: suddenly)',
    # hard cases: no verb, unknown tags, nothing, twenty words
    'a/DET slow/ADJ walk/NOUN': '',
    '': '',
    'a/X person/X walk/VERB zigzag/X': 'walk(ARG0: a person; ARG1: zigzag)',
    'the/DET man/NOUN walk/VERB forward/ADV quickly/ADV then/ADV turn/VERB to/ADP the/DET '
    'left/NOUN before/ADP sit/VERB down/ADV on/ADP a/DET chair/NOUN with/ADP his/DET hand/NOUN '
    'up/ADV':
        'walk(ARG0: the man; DIR: forward; MNR: quickly) turn(TMP: then; DIR: to the left) '
        'sit(TMP: before; DIR: down; LOC: on a chair; ARG2: with his hand; DIR: up)'}


def written(nodes):
    """[('walk', 2), ('a man', 3)] -> 'walk(ARG0: a man)'"""
    actions = []
    for words, role in nodes:
        if role == text.ACTION:
            actions.append((words, []))
        else:
            actions[-1][1].append(f'{text.EDGES[role - text.FIRST_EDGE]}: {words}')
    return ' '.join(f'{verb}({"; ".join(phrases)})' for verb, phrases in actions)


@pytest.mark.parametrize('tokens', GRAPHS)
def test_graphs(tokens):
    assert written(text.caption_graph(tokens)) == GRAPHS[tokens]


def test_prompts_get_the_tags_of_training_captions():
    table = text.tag_table(GRAPHS)
    tagged = text.tagged('A man is kicking with his left leg, then he walks.', table)
    assert written(text.caption_graph(tagged)) == (
        'kicking(ARG0: a man; ARG2: with his left leg) walks(TMP: then; ARG0: he)')
    assert text.caption_graph(text.tagged('zorp', table)) == []


def test_roles_have_the_same_numbers_in_both_files():
    names = ('MOTION', 'ACTION', 'FIRST_EDGE')
    assert [getattr(hgm3, name) for name in names] == [getattr(text, name) for name in names]
    assert hgm3.N_EDGES == len(text.EDGES)
    assert text.EDGES[-1] == 'MA'
