"""Captions -> condition tokens: all that the transformers know of language.

A caption becomes c (m, 512) with role (m,): m condition tokens, the first of which is the vector of
the whole sentence. The setting `text` says what follows it:

    'sentence'  nothing, as published in MoMask and DynMask
    'clauses'   its clauses in order, each encoded by itself. One vector of a sentence with three
                actions says little about their order
    'graph'     the nodes of its semantic graph (HGM3 3.3; `caption_graph` below)

One of two frozen encoders turns them into vectors:

    'clip'  the text tower of OpenAI's ViT-B/32 through open_clip, un-normalized, as in MoMask. It
            downloads 350 MB on first use
    'hash'  a hashed bag of words and of word pairs, which encode the order ("then kicks"). No
            weights; enough for toy and bandai, whose language is a small grammar
"""
import functools
import hashlib
import os
import re
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from lib.configurator import UserError
from lib.runtime import atomic_write, read_arrays

DIM = 512
MOST_LETTERS = 1000   # of a prompt
MOST_TOKENS = 24   # condition tokens behind the sentence; the rest of a longer caption is left out
# words that the hash encoder ignores: people use or omit them at random
FUNCTION_WORDS = set('a an the he she they it is are his her their its to on with of at in'.split())
CLAUSE_END = (r'[,.;!?]|\b(?:and|then|next|before|after that|afterwards|after|while|finally|lastly|'
              r'first)\b')


# --------------------------------------------------------------------------------- condition tokens


def caption_vectors(captions, encoder, text='sentence', tokens=None, cache=None, device='cpu',
                    tower=None):
    """captions (list of N str) -> c (N, m, 512) float32, role (N, m) int8, on the CPU. Arguments as
    in `encode_captions`."""
    vectors, index, role = encode_captions(captions, encoder, text, tokens, cache, device, tower)
    return vectors[index], role


def encode_captions(captions, encoder, text='sentence', tokens=None, cache=None, device='cpu',
                    tower=None):
    """captions (list of N str) -> vectors (U, 512) float32, index (N, m) int, role (N, m) int8.

    The condition tokens of caption i are vectors[index[i]]. A text that captions share is encoded
    once. Vector 0 is zero and pads; role is 0 there, elsewhere 1 or the role of the node.

    encoder  'clip' or 'hash'
    text     'sentence', 'clauses' or 'graph'
    tokens   for 'graph', the N captions with part-of-speech tags, 'a/DET man/NOUN walk/VERB'
    cache    a folder that keeps CLIP's vectors, so that only new captions are encoded
    tower    replaces `clip_tower` (tests)

    UserError where CLIP's weights cannot be had, and (hash) for a caption without a word.
    """
    behind = [[] for _ in captions]   # what follows each sentence, as (str, role)
    if text == 'clauses':
        behind = [[(clause, 1) for clause in clauses(caption)] for caption in captions]
    if text == 'graph':
        behind = [caption_graph(tagged_caption) for tagged_caption in tokens]
    parts = [[(caption, 1), *nodes[:MOST_TOKENS]] for caption, nodes in zip(captions, behind)]

    unique = list(dict.fromkeys(piece for part in parts for piece, _ in part))
    place = {piece: 1 + i for i, piece in enumerate(unique)}
    if encoder == 'hash':
        vectors = hash_encode(unique)   # 20,000 captions a second: not worth a file
        for caption in captions:
            if not vectors[place[caption] - 1].any():
                raise UserError(f"'{caption:.80}' has no word for the hash encoder, which reads "
                                'a-z and 0-9: write it in English, or use a model that was trained '
                                'with --text_encoder=clip.')
    else:
        vectors = cached_encode(unique, cache, tower or clip_tower, device)

    index = [torch.tensor([place[piece] for piece, _ in part]) for part in parts]
    role = [torch.tensor([role for _, role in part], dtype=torch.int8) for part in parts]
    index, role = pad_sequence(index, batch_first=True), pad_sequence(role, batch_first=True)
    return F.pad(vectors, (0, 0, 1, 0)), index, role


def words(caption):
    return re.findall(r"[a-z0-9']+", caption.lower())


def stem(word):
    """jogs, jogging, jog -> jog; raises, raising, raise -> rais: a prompt may inflect a word
    differently than the training captions."""
    return re.sub(r'(\w\w+?)(\w)\2?(?:ing|es|ed|s|e)?$', r'\1\2', word)


def check_prompt(prompt, encoder):
    """UserError for a prompt that is empty, too long, or that the encoder cannot read."""
    if not re.search(r'\w', prompt) or len(prompt) > MOST_LETTERS:
        raise UserError(f"the prompt '{prompt:.30}' is empty, or longer than {MOST_LETTERS} "
                        'characters: say what the person does, as in "a person walks".')
    if encoder == 'hash' and not words(prompt):
        raise UserError(f"'{prompt:.60}': I only read English letters.")


def unseen_words(prompt, tags):
    """A remark that names the words of a prompt whose stems are not among those of the training
    captions (`tag_table`), '' if there are none."""
    new = [word for word in dict.fromkeys(words(prompt))
           if tags and stem(word) not in tags and word not in FUNCTION_WORDS]
    return f'never seen in training: {", ".join(new)}' if new else ''


def clauses(caption):
    """A caption (str) -> its clauses (list of str)."""
    found = re.split(CLAUSE_END, caption.lower())
    return [clause.strip() for clause in found if words(clause)]


# ----------------------------------------------------------------------------------------- encoders


def hash_encode(captions):
    """captions (list of N str) -> (N, 512) float32. The stem of each word and each pair of adjacent
    stems adds its own fixed Gaussian vector. The sum is scaled to norm sqrt(512), so that entries
    have size 1 whatever the length."""
    table = {}

    def vector(feature):   # blake2b, not hash(): the same in every process and on every machine
        if feature not in table:
            seed = hashlib.blake2b(feature.encode(), digest_size=8).digest()
            generator = np.random.default_rng(int.from_bytes(seed, 'little'))
            table[feature] = generator.standard_normal(DIM)
        return table[feature]

    out = np.zeros((len(captions), DIM), np.float32)
    for row, caption in zip(out, captions):
        singles = [stem(word) for word in words(caption) if word not in FUNCTION_WORDS]
        pairs = [f'{a} {b}' for a, b in zip(singles, singles[1:])]
        total = sum((vector(feature) for feature in singles + pairs), np.zeros(DIM))
        row[:] = total * np.sqrt(DIM) / max(np.linalg.norm(total), 1e-8)
    return torch.from_numpy(out)


def cached_encode(captions, cache, make_tower, device):
    """CLIP vectors (N, 512) of the captions. The tower is only built if one of them is new."""
    path = os.path.join(cache, 'text_clip.npz') if cache else None
    known = {}
    if path and os.path.exists(path):
        hint = 'delete it, and it is computed again'
        cached, vectors = read_arrays(path, hint, ('captions', 'vectors'))
        good = vectors.shape == (cached.size, DIM) and vectors.dtype == np.float32
        if not good or not np.isfinite(vectors).all():
            raise UserError(f'{path} does not hold vectors of captions: {hint}.')
        known = dict(zip(cached.tolist(), vectors))

    new = sorted(set(captions) - set(known))
    if new:
        tower = make_tower(device=device)
        known.update(zip(new, tower(new).numpy()))
    if new and path:
        with atomic_write(path) as f:   # several ranks may write it at once
            np.savez(f, captions=list(known), vectors=np.stack(list(known.values())))
    rows = [known[caption] for caption in captions]
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, DIM)


@functools.cache
def clip_tower(pretrained='openai', device='cpu'):
    """The frozen CLIP text encoder: a function from a list of N captions to (N, 512) float32,
    un-normalized. pretrained=None: random weights, for tests."""
    import open_clip   # takes 3 seconds, and is only needed for new captions
    # OpenAI trained with quickgelu; plain ViT-B-32 has another GELU and gives no warning
    name = 'ViT-B-32-quickgelu'
    try:
        model = open_clip.create_model(name, pretrained=pretrained)
    except Exception as e:
        raise UserError(f'The CLIP weights could not be loaded ({type(e).__name__}): they are '
                        'downloaded once, which needs a network or a filled cache; a model '
                        'trained with --text_encoder=hash needs no weights.') from None
    model.visual = None   # only the text tower is used
    model = model.eval().requires_grad_(False).to(device)
    tokenizer = open_clip.get_tokenizer(name)

    @torch.no_grad()
    def encode_batch(captions):
        """model.encode_text without its padding. Attention is causal and a caption is read from its
        last token, so columns behind the longest caption do not matter: 16 columns instead of 77
        take a fifth of the time."""
        ids = tokenizer(captions).to(device)
        last = ids.argmax(-1)   # the end token has the largest id
        L = int(last.max()) + 1
        x = model.token_embedding(ids[:, :L]) + model.positional_embedding[:L]
        x = model.transformer(x, attn_mask=model.attn_mask[:L, :L])
        x = model.ln_final(x)
        return x[torch.arange(len(x)), last] @ model.text_projection

    def encode(captions):
        vectors = [torch.zeros(0, DIM)]
        for i in range(0, len(captions), 64):
            # no autocast: cached vectors must not depend on the script that asked for them
            with torch.autocast(torch.device(device).type, enabled=False):
                vectors.append(encode_batch(captions[i:i + 64]).cpu())
        return torch.cat(vectors)

    return encode


# --------------------------------------------------------------- semantic graph of a caption (HGM3)

# Roles of the nodes, the same numbers as in hgm3.py: the sentence, a verb, and for a phrase
# FIRST_EDGE + the number of its edge.
MOTION, ACTION, FIRST_EDGE = 1, 2, 3

# PropBank's semantic roles: ARG0 to ARG4 are who, what, to whom or with what, from where and to
# where; then location, manner, time, direction, adverb. MA leads from the sentence to a verb.
EDGES = ('ARG0', 'ARG1', 'ARG2', 'ARG3', 'ARG4', 'LOC', 'MNR', 'TMP', 'DIR', 'ADV', 'OTHERS', 'MA')

# The paper's parser of semantic roles (AllenNLP) is no longer maintained. Here the edge of a phrase
# follows from its first word and the part-of-speech tags that the data sets ship.
WORDS_OF_EDGE = {
    'ARG2': 'with using by for',
    'ARG3': 'from off',
    'ARG4': 'to into onto towards toward',
    'LOC': 'in on at over under across near behind between through along beside',
    'MNR': 'like as quickly slowly fast',
    'TMP': 'then again twice first next finally lastly once before after during until while when',
    'DIR': 'forward forwards backward backwards left right up down ahead back around away '
           'sideways straight clockwise counterclockwise',
}
EDGE_OF_WORD = {word: edge for edge, of_edge in WORDS_OF_EDGE.items() for word in of_edge.split()}
SIDES = {'left', 'right', 'side', 'front', 'back'}
CONJUNCTIONS = ('CCONJ', 'SCONJ', 'PUNCT')
ORDER = {'then', 'next', 'finally', 'lastly', 'after', 'before', 'while'}


def caption_graph(tokens):
    """'a/DET man/NOUN walk/VERB forward/ADV' -> [('walk', 2), ('a man', 3), ('forward', 11)]: the
    nodes behind the sentence with their roles. A caption without a verb has none."""
    nodes = []
    waiting = []      # phrases that belong to the next verb
    joined = True     # no verb so far, or a conjunction since the last one
    for phrase in phrases(tokens):
        word, tag = phrase[0]
        if tag == 'VERB':
            nodes.append((word, ACTION))
            nodes += [phrase_node(p, 'ARG0') for p in waiting]
            if phrase[1:]:
                nodes.append(phrase_node(phrase[1:], 'ARG1'))
            waiting = []
            joined = False
            continue

        joined = joined or tag in CONJUNCTIONS or word in ORDER
        if tag in CONJUNCTIONS:
            phrase = phrase[1:]
        if phrase and joined:
            waiting.append(phrase)
        elif phrase:
            nodes.append(phrase_node(phrase, 'ARG1'))
    if nodes:
        nodes += [phrase_node(p, 'ARG1') for p in waiting]
    return nodes


def phrases(tokens):
    """Tagged words -> phrases [(word, tag)]. A verb, a preposition, an adverb or a conjunction
    begins a new one; an adverb is a phrase by itself."""
    found = [[]]
    for token in tokens.split():
        word, _, tag = token.rpartition('/')
        after_adverb = found[-1] and found[-1][0][1] == 'ADV'
        if tag in ('VERB', 'ADP', 'ADV', *CONJUNCTIONS) or after_adverb:
            found.append([])
        if tag != 'AUX':
            found[-1].append((word, tag))
    return [phrase for phrase in found if phrase]


def phrase_node(phrase, default):
    """The node (text, role) of a phrase. `default` is the edge of one that begins with neither a
    preposition nor an adverb."""
    word, tag = phrase[0]
    edge = default
    if tag == 'ADP' or tag == 'ADV':
        edge = EDGE_OF_WORD.get(word, 'ADV' if tag == 'ADV' else 'OTHERS')
    if edge == 'ARG4' and SIDES & {w for w, _ in phrase}:
        edge = 'DIR'   # "to the left" is not a place
    return ' '.join(w for w, _ in phrase), FIRST_EDGE + EDGES.index(edge)


def tag_table(captions):
    """The most frequent tag of each word stem in training captions 'walk/VERB left/ADJ'."""
    counts = {}
    for tokens in captions:
        for token in tokens.split():
            word, _, tag = token.rpartition('/')
            counts.setdefault(stem(word), Counter())[tag] += 1
    return {word: count.most_common(1)[0][0] for word, count in counts.items()}


def tagged(prompt, table):
    """Tag a prompt by `tag_table`. An unknown word counts as a noun, a comma as a conjunction."""
    found = re.findall(r"[a-z0-9']+|[,.;]", prompt.lower())
    tags = ['PUNCT' if word in ',.;' else table.get(stem(word), 'NOUN') for word in found]
    return ' '.join(f'{word}/{tag}' for word, tag in zip(found, tags))
