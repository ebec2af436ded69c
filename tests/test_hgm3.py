"""hgm3.py against the plain formulas of the paper, and against MoMask where it adds nothing."""
import copy

import pytest
import torch
import torch.nn.functional as F

import hgm3
import model
from generate import generate_base
from lib import text
from masking import mask_tokens
from model import LossPredictor, MaskTransformer, ModelConfig

SMALL = dict(n_codes=20, code_dim=8, n_quantizers=4, latent=24, n_layers=3, n_heads=3, ff=32)

# what a person would draw: verb(role: words; ...) for each action, in order
GRAPHS = {
    # the toy set's grammar
    'a/DET person/NOUN jump/VERB': 'jump(ARG0: a person)',
    'someone/PRON wave/VERB with/ADP the/DET left/ADJ hand/NOUN slowly/ADV':
        'wave(ARG0: someone; ARG2: with the left hand; MNR: slowly)',
    'a/DET person/NOUN stroll/VERB ahead/ADV slowly/ADV then/ADV bounce/VERB on/ADP '
    'one/NUM leg/NOUN':
        'stroll(ARG0: a person; DIR: ahead; MNR: slowly) bounce(TMP: then; LOC: on one leg)',
    'the/DET person/NOUN leap/VERB up/ADV and/CCONJ then/ADV jog/VERB ahead/ADV finally/ADV '
    'sit/VERB down/ADV':
        'leap(ARG0: the person; DIR: up) jog(TMP: then; DIR: ahead) sit(TMP: finally; DIR: down)',
    'a/DET man/NOUN take/VERB a/DET seat/NOUN': 'take(ARG0: a man; ARG1: a seat)',
    'the/DET person/NOUN shuffle/VERB to/ADP the/DET right/NOUN':
        'shuffle(ARG0: the person; DIR: to the right)',
    'a/DET person/NOUN raise/VERB both/DET hand/NOUN and/CCONJ after/ADP that/PRON bow/VERB':
        'raise(ARG0: a person; ARG1: both hand) bow(TMP: after that)',
    # HumanML3D's lines
    'a/DET man/NOUN kick/VERB something/PRON or/CCONJ someone/PRON with/ADP his/DET left/ADJ '
    'leg/NOUN':
        'kick(ARG0: a man; ARG1: something; ARG1: someone; ARG2: with his left leg)',
    'he/PRON is/AUX walk/VERB from/ADP the/DET door/NOUN to/ADP the/DET table/NOUN':
        'walk(ARG0: he; ARG3: from the door; ARG4: to the table)',
    'person/NOUN walk/VERB around/ADP in/ADP a/DET circle/NOUN':
        'walk(ARG0: person; DIR: around; LOC: in a circle)',
    'a/DET person/NOUN who/PRON sit/VERB stand/VERB up/ADV':
        'sit(ARG0: a person who) stand(DIR: up)',
    'a/DET figure/NOUN bend/VERB down/ADP while/SCONJ hold/VERB a/DET box/NOUN':
        'bend(ARG0: a figure; DIR: down) hold(ARG1: a box)',
    'the/DET man/NOUN run/VERB like/ADP a/DET child/NOUN':
        'run(ARG0: the man; MNR: like a child)',
    'walk/VERB forward/ADV': 'walk(DIR: forward)',
    'a/DET man/NOUN wave/VERB and/CCONJ a/DET woman/NOUN bow/VERB':
        'wave(ARG0: a man) bow(ARG0: a woman)',
    'a/DET person/NOUN suddenly/ADV fall/VERB': 'fall(ARG0: a person; ADV: suddenly)',
    # hard cases: no verb, unknown tags, nothing, twenty words
    'a/DET slow/ADJ walk/NOUN': '',
    '': '',
    'a/X person/X walk/VERB zigzag/X': 'walk(ARG0: a person; ARG1: zigzag)',
    'the/DET man/NOUN walk/VERB forward/ADV quickly/ADV then/ADV turn/VERB to/ADP the/DET '
    'left/NOUN before/ADP sit/VERB down/ADV on/ADP a/DET chair/NOUN with/ADP his/DET hand/NOUN up/ADV':
        'walk(ARG0: the man; DIR: forward; MNR: quickly) turn(TMP: then; DIR: to the left) '
        'sit(TMP: before; DIR: down; LOC: on a chair; ARG2: with his hand; DIR: up)',
}


def drawn(nodes):
    """[('walk', 2), ('a man', 3)] -> 'walk(ARG0: a man)'"""
    actions = []
    for words, role in nodes:
        if role == text.ACTION:
            actions.append((words, []))
        else:
            actions[-1][1].append(f'{text.EDGES[role - text.FIRST_EDGE]}: {words}')
    return ' '.join(f'{verb}({"; ".join(said)})' for verb, said in actions)


@pytest.mark.parametrize('tokens', GRAPHS)
def test_graphs_by_hand(tokens):
    assert drawn(text.caption_graph(tokens)) == GRAPHS[tokens]


def test_prompts_get_the_tags_of_training_captions():
    table = text.tag_table(GRAPHS)
    tagged = text.tagged('A man is kicking with his left leg, then he walks.', table)
    assert drawn(text.caption_graph(tagged)) == (
        'kicking(ARG0: a man; ARG2: with his left leg) walks(TMP: then; ARG0: he)')
    assert text.caption_graph(text.tagged('zorp', table)) == []


def roles_of(tokens):
    nodes = text.caption_graph(tokens)
    return torch.tensor([[1, *(role for _, role in nodes)]])


def test_edges_are_those_of_the_tree():
    role = torch.tensor([[1, 2, 3, 11, 2, 5, 0]])
    kind = hgm3.edges(role)[0]
    expected = torch.full((7, 7), -1)
    for parent, child, edge in ((0, 1, 11), (0, 4, 11), (1, 2, 0), (1, 3, 8), (4, 5, 2)):
        expected[parent, child] = expected[child, parent] = edge
    assert torch.equal(kind, expected)
    assert torch.equal(hgm3.edges(hgm3.visible_nodes(role, 1))[0], expected)   # hidden nodes stay in it


def test_graph_attention_is_eqs_9_to_11():
    torch.manual_seed(0)
    layer = hgm3.GraphAttention(6)
    role = torch.tensor([[1, 2, 3, 11, 2, 5, 0]])
    c = torch.randn(1, 7, 6)
    kind = hgm3.edges(role)[0]
    h = c[0] @ layer.W.weight.T
    M, M_r = layer.M.weight[0], layer.M_r.weight
    for i in range(7):
        near = [j for j in range(7) if kind[i, j] >= 0]
        out = torch.zeros(6)
        if near:
            e = []
            for j in near:
                both = torch.cat([h[i], h[j]])
                e.append(F.leaky_relu(M @ both, 0.2) + F.leaky_relu(M_r[kind[i, j]] @ both, 0.2))
            weights = torch.stack(e).softmax(0)
            out = sum(w * h[j] for w, j in zip(weights, near))
        assert (layer(c, role)[0, i] - (F.elu(out) + c[0, i])).abs().max() < 1e-6


def test_order_of_specifics_and_padding_change_nothing():
    torch.manual_seed(0)
    layer = hgm3.GraphAttention(6)
    role = torch.tensor([[1, 2, 3, 11, 2, 5, 0]])
    c = torch.randn(1, 7, 6)
    C = layer(c, role)
    other = [0, 1, 3, 2, 4, 5, 6]   # the first action's two specifics change places
    assert (layer(c[:, other], role[:, other]) - C[:, other]).abs().max() < 1e-6
    longer = torch.cat([c, torch.randn(1, 3, 6)], 1)
    assert (layer(longer, F.pad(role, (0, 3)))[:, :7] - C).abs().max() < 1e-6


def test_levels():
    role = torch.tensor([[1, 2, 3, 11, 2, 5, 0]])
    for level, shown in ((1, [0]), (2, [0, 1, 4]), (3, [0, 1, 2, 3, 4, 5])):
        visible = hgm3.visible_nodes(role, level)
        assert (visible[0] > 0).nonzero()[:, 0].tolist() == shown
        assert torch.equal(visible.abs(), role)
        assert torch.equal(hgm3.visible_nodes(visible, 3), role)
    assert [hgm3.decoding_level(step) for step in range(10)] == [1, 1, 2, 2, 2, 3, 3, 3, 3, 3]   # Eq 14
    assert [hgm3.training_level(step) for step in range(4)] == [1, 2, 3, 1]


@pytest.fixture
def small():
    torch.manual_seed(0)
    config = ModelConfig(**SMALL, graph=True, spectral_attn=False, dropout=0.0)
    tokens = list(GRAPHS)[:4]
    c, role = text.caption_vectors(tokens, 'hash', 'graph', tokens)
    valid = torch.arange(12) < torch.tensor([12, 5, 9, 12])[:, None]
    return MaskTransformer(config, torch.randn(20, 8)).eval(), c, role, valid


def test_hidden_nodes_act_through_the_graph_only(small):
    """At level 1 the transformer is shown C^m alone, which contains the actions (Eq 11)."""
    m, c, role, valid = small
    ids = torch.randint(20, valid.shape)
    motion = hgm3.visible_nodes(role, 1)
    with torch.no_grad():
        out = m(ids, c, motion, valid)
        changed = c.clone()
        changed[:, 1] += 1   # the first action
        assert (m(ids, changed, motion, valid) - out)[valid].abs().max() > 1e-4
        changed = c.clone()
        changed[:, 2] += 1   # a phrase: not a neighbour of the motion node
        assert (m(ids, changed, motion, valid) - out)[valid].abs().max() < 1e-6
        longer = torch.cat([c, torch.randn(4, 3, 512)], 1)
        padded = m(ids, longer, F.pad(motion, (0, 3)), valid)
    assert (padded - out)[valid].abs().max() < 1e-5


def test_hidden_nodes_cost_no_tokens(small, monkeypatch):
    """Hidden condition tokens are removed from the batch, and nothing else changes."""
    m, c, role, valid = small
    ids = torch.randint(20, valid.shape)
    for level in (1, 2, 3):
        shown = hgm3.visible_nodes(role, level)
        with torch.no_grad():
            front, front_valid = m.trunk.condition_tokens(c, shown)
            out = m(ids, c, shown, valid)
            with monkeypatch.context() as patch:
                patch.setattr(model, 'drop_hidden', lambda front, shown: (front, shown))
                unpacked, _ = m.trunk.condition_tokens(c, shown)
                plain = m(ids, c, shown, valid)
        assert front.shape[1] == (shown > 0).sum(1).max()
        assert level > 1 or front.shape[1] == 1
        assert torch.equal(front_valid.sum(1), (shown > 0).sum(1))
        for row in range(len(c)):
            assert torch.equal(front[row][front_valid[row]], unpacked[row][shown[row] > 0])
        assert (out - plain)[valid].abs().max() < 1e-5


def test_decoding_shows_more_nodes_step_by_step(small):
    m, c, role, valid = small
    shown = []
    forward = m.forward

    def remember(ids, c, role, *more, **rest):
        shown.append((role > 0).sum(1))
        return forward(ids, c, role, *more, **rest)

    m.forward = remember
    generate_base(m, c, role, valid.sum(1), steps=10)
    n_actions = (role == 2).sum(1)
    every = (role > 0).sum(1)
    for step, counts in enumerate(shown):
        expected = 1 + n_actions if 2 <= step < 5 else torch.ones_like(every)
        expected = every if step >= 5 else expected
        assert torch.equal(counts[:4], expected)
        assert (counts[4:] == 1).all()   # without text: the motion node, which is zero


# ------------------------------------------------------------------------------- hard token mining


def test_relative_loss_is_a_double_loop():
    g = torch.Generator().manual_seed(0)
    predicted, loss = torch.randn(3, 7, generator=g), torch.rand(3, 7, generator=g)
    masked = torch.rand(3, 7, generator=g) < 0.6
    total, pairs = 0.0, 0
    for b in range(3):
        for i in range(7):
            for j in range(7):
                if i != j and masked[b, i] and masked[b, j]:
                    p = torch.sigmoid(predicted[b, i] - predicted[b, j])
                    harder = loss[b, i] > loss[b, j]
                    total -= float(p.log() if harder else (1 - p).log())   # Eq 5
                    pairs += 1
    assert abs(float(hgm3.relative_loss(predicted, loss, masked)) - total / pairs) < 1e-5
    assert hgm3.relative_loss(predicted, loss, torch.zeros_like(masked)) == 0


def mining(**more):
    torch.manual_seed(0)
    config = ModelConfig(**{**SMALL, 'spectral_attn': False, 'dropout': 0.0, **more})
    return hgm3.HardTokenMining(MaskTransformer(config, torch.randn(20, 8)),
                                LossPredictor(config))


def batch():
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(20, (6, 12), generator=g)
    valid = torch.arange(12) < torch.tensor([12, 5, 9, 12, 7, 12])[:, None]
    return ids, torch.randn(6, 1, 512, generator=g), torch.ones(6, 1, dtype=torch.int8), valid


def loss_of(miner):
    ids, c, role, valid = batch()
    masked, chosen = mask_tokens(miner.reconstructor, ids, c, valid, 'random',
                                 generator=torch.Generator().manual_seed(0))
    targets = torch.where(chosen, ids, -100)
    loss = miner(masked, c, role, valid, targets, chosen.sum(), None, ids)
    alone = miner.reconstructor(masked, c, role, valid, targets)
    return loss, alone


def test_gradients_of_the_two_losses_do_not_mix():
    miner = mining()
    loss, alone = loss_of(miner)
    loss.backward()
    ours = [p.grad.clone() for p in miner.reconstructor.parameters()]
    assert any(p.grad.abs().max() > 0 for p in miner.student.parameters())
    assert all(p.grad is None for p in miner.teacher.parameters())
    miner.zero_grad()
    alone.backward()
    for p, before in zip(miner.reconstructor.parameters(), ours):
        assert torch.equal(p.grad, before)   # F's gradient is MoMask's, bit for bit
    assert all(p.grad is None for p in miner.student.parameters())


def test_the_teacher_is_the_students_moving_average(monkeypatch):
    monkeypatch.setattr(hgm3, 'TEACHER_MOMENTUM', 0.9)
    miner = mining()
    expected = [p.clone() for p in miner.teacher.parameters()]
    for step in range(4):
        with torch.no_grad():
            for p in miner.student.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(step)))
        miner.update_teacher()
        expected = [0.9 * e + 0.1 * p for e, p in zip(expected, miner.student.parameters())]
    for p, e in zip(miner.teacher.parameters(), expected):
        assert (p - e).abs().max() < 1e-5


@pytest.mark.parametrize('mask_by', ['loss', 'msd+loss'])
def test_how_many_hard_and_random_masks(mask_by):
    model = mining().reconstructor
    ids, c, _, valid = batch()
    difficulty = torch.arange(12.0).expand(6, 12)   # the last tokens are the hardest
    for t, share in ((0, 0.0), (500, 0.25), (1000, 0.5)):
        alpha = hgm3.hard_share(t, 1000)
        assert alpha == share                                             # Eq 8
        _, chosen = mask_tokens(model, ids, c, valid, mask_by, 0.8, difficulty=difficulty,
                                hard_share=alpha)
        n = valid.sum(1)
        K = (0.8 * n).round()
        assert torch.equal(chosen.sum(1), K.long())
        assert not (chosen & ~valid).any()
        if mask_by == 'loss':
            K_hard = (alpha * K).round().long()
            for row in range(6):
                last = chosen[row, :n[row]].flip(0)
                assert last[:K_hard[row]].all()


def test_without_hard_tokens_it_is_momask_to_the_bit():
    """With a hard share of 0: the same masks, so the same weights after training."""
    weights = []
    for mask_by in ('random', 'loss'):
        miner = mining(dropout=0.1)
        model = miner.reconstructor
        net = miner if mask_by == 'loss' else model
        optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
        g = torch.Generator().manual_seed(0)
        torch.manual_seed(5)
        for _ in range(4):
            ids, c, role, valid = batch()
            difficulty = miner.difficulty(ids, c, role, valid)
            masked, chosen = mask_tokens(model, ids, c, valid, mask_by, generator=g,
                                         difficulty=difficulty, hard_share=0.0)
            targets = torch.where(chosen, ids, -100)
            inputs = masked, c, role, valid, targets, chosen.sum()
            loss = net(*inputs, None, ids) if mask_by == 'loss' else net(*inputs)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(copy.deepcopy(model.state_dict()))
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_roles_have_the_same_numbers_in_both_files():
    assert (hgm3.MOTION, hgm3.ACTION, hgm3.FIRST_EDGE) == (text.MOTION, text.ACTION, text.FIRST_EDGE)
    assert hgm3.N_EDGES == len(text.EDGES) and text.EDGES[-1] == 'MA'
