"""hgm3.py against the plain formulas of the paper, and against MoMask where it adds nothing."""
import copy

import pytest
import torch
import torch.nn.functional as F

import hgm3
import model
from generate import generate_base
from lib.text import caption_vectors
from masking import mask_tokens
from model import LossPredictor, MaskTransformer, ModelConfig

SMALL = dict(n_codes=20, code_dim=8, n_quantizers=4, latent=24, n_layers=3, n_heads=3, ff=32)
ROLE = torch.tensor([[1, 2, 3, 11, 2, 5, 0]])   # sentence, verb, two phrases, verb, phrase, nothing
CAPTIONS = [
    'a/DET person/NOUN jump/VERB',
    'someone/PRON wave/VERB with/ADP the/DET left/ADJ hand/NOUN slowly/ADV',
    'a/DET person/NOUN stroll/VERB ahead/ADV then/ADV bounce/VERB on/ADP one/NUM leg/NOUN',
    'a/DET man/NOUN leap/VERB up/ADV then/ADV jog/VERB ahead/ADV finally/ADV sit/VERB down/ADV']

def test_edges_are_those_of_the_tree():
    kind = hgm3.edges(ROLE)[0]
    expected = torch.full((7, 7), -1)
    for parent, child, edge in ((0, 1, 11), (0, 4, 11), (1, 2, 0), (1, 3, 8), (4, 5, 2)):
        expected[parent, child] = expected[child, parent] = edge
    assert torch.equal(kind, expected)
    motion_only = hgm3.visible_nodes(ROLE, 1)
    assert torch.equal(hgm3.edges(motion_only)[0], expected)   # hidden nodes stay in the graph


def test_graph_attention_is_eqs_9_to_11():
    """And the order of a verb's phrases does not matter."""
    torch.manual_seed(0)
    layer = hgm3.GraphAttention(6)
    c = torch.randn(1, 7, 6)
    C = layer(c, ROLE)
    kind = hgm3.edges(ROLE)[0]
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
        assert (C[0, i] - (F.elu(out) + c[0, i])).abs().max() < 1e-6
    other = [0, 1, 3, 2, 4, 5, 6]
    assert (layer(c[:, other], ROLE[:, other]) - C[:, other]).abs().max() < 1e-6


def test_levels():
    for level, shown in ((1, [0]), (2, [0, 1, 4]), (3, [0, 1, 2, 3, 4, 5])):
        visible = hgm3.visible_nodes(ROLE, level)
        assert (visible[0] > 0).nonzero()[:, 0].tolist() == shown
        assert torch.equal(visible.abs(), ROLE)
        assert torch.equal(hgm3.visible_nodes(visible, 3), ROLE)
    decoding = [hgm3.decoding_level(step) for step in range(10)]          # Eq 14
    assert decoding == [1, 1, 2, 2, 2, 3, 3, 3, 3, 3]
    assert [hgm3.training_level(step) for step in range(4)] == [1, 2, 3, 1]


@pytest.fixture
def small():
    torch.manual_seed(0)
    config = ModelConfig(**SMALL, graph=True, spectral_attn=False, dropout=0.0)
    c, role = caption_vectors(CAPTIONS, 'hash', 'graph', CAPTIONS)
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


def test_gradients_of_the_two_losses_do_not_mix():
    miner = mining()
    ids, c, role, valid = batch()
    masked, chosen = mask_tokens(miner.reconstructor, ids, c, valid, 'random')
    targets = torch.where(chosen, ids, -100)
    miner(masked, c, role, valid, targets, chosen.sum(), None, ids).backward()
    ours = [p.grad.clone() for p in miner.reconstructor.parameters()]
    assert any(p.grad.abs().max() > 0 for p in miner.student.parameters())
    assert all(p.grad is None for p in miner.teacher.parameters())
    miner.zero_grad()
    miner.reconstructor(masked, c, role, valid, targets).backward()
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
