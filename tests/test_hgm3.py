"""hgm3.py against the plain formulas of the paper, and against MoMask where it adds nothing."""
import copy

import pytest
import torch
import torch.nn.functional as F
from test_model import SMALL, first_of, seeded, small_mask, worst

import hgm3
import model
from generate import generate_base
from lib.text import caption_vectors
from masking import mask_tokens
from model import LossPredictor, MaskTransformer, ModelConfig

ROLE = torch.tensor([[1, 2, 3, 11, 2, 5, 0]])   # sentence, verb, two phrases, verb, phrase, nothing
EDGES = {(0, 1): 11, (0, 4): 11, (1, 2): 0, (1, 3): 8, (4, 5): 2}   # (parent, child): kind
CAPTIONS = [
    'a/DET person/NOUN jump/VERB',
    'someone/PRON wave/VERB with/ADP the/DET left/ADJ hand/NOUN slowly/ADV',
    'a/DET person/NOUN stroll/VERB ahead/ADV then/ADV bounce/VERB on/ADP one/NUM leg/NOUN',
    'a/DET man/NOUN leap/VERB up/ADV then/ADV jog/VERB ahead/ADV finally/ADV sit/VERB down/ADV']

# ---------------------------------------------------------------------------------- semantic graph


def test_graph_attention_is_eqs_9_to_11():
    """Over the edges of the tree, hidden nodes included. The order of a verb's phrases has no
    effect."""
    torch.manual_seed(0)
    layer = hgm3.GraphAttention(6)
    c = torch.randn(1, 7, 6)
    C = layer(c, hgm3.visible_nodes(ROLE, 1))
    h = c[0] @ layer.W.weight.T
    M, M_r = layer.M.weight[0], layer.M_r.weight
    kinds = EDGES | {(child, parent): kind for (parent, child), kind in EDGES.items()}
    for i in range(7):
        near = [j for j in range(7) if (i, j) in kinds]
        out = torch.zeros(6)
        if near:
            both = [torch.cat([h[i], h[j]]) for j in near]
            e = [F.leaky_relu(M @ pair, 0.2) + F.leaky_relu(M_r[kinds[i, j]] @ pair, 0.2)
                 for j, pair in zip(near, both)]
            out = torch.stack(e).softmax(0) @ h[near]
        assert worst(C[0, i], F.elu(out) + c[0, i]) < 1e-6
    other = [0, 1, 3, 2, 4, 5, 6]
    assert worst(layer(c[:, other], ROLE[:, other]), C[:, other]) < 1e-6


def test_levels():
    for level, shown in ((1, [0]), (2, [0, 1, 4]), (3, [0, 1, 2, 3, 4, 5])):
        visible = hgm3.visible_nodes(ROLE, level)
        assert (visible[0] > 0).nonzero()[:, 0].tolist() == shown
        assert torch.equal(visible.abs(), ROLE)
        assert torch.equal(hgm3.visible_nodes(visible, 3), ROLE)
    assert [hgm3.training_level(step) for step in range(4)] == [1, 2, 3, 1]


@pytest.fixture
def small():
    torch.manual_seed(0)
    m = small_mask(graph=True, spectral_attn=False, dropout=0.0).eval()
    c, role = caption_vectors(CAPTIONS, 'hash', 'graph', CAPTIONS)
    return m, c, role, first_of(12, [12, 5, 9, 12])


@torch.no_grad()
def test_hidden_nodes_act_through_the_graph_only(small):
    """At level 1 the transformer is shown C^m alone, which contains the actions (Eq 11)."""
    m, c, role, valid = small
    ids = torch.randint(20, valid.shape)
    motion = hgm3.visible_nodes(role, 1)
    out = m(ids, c, motion, valid)
    action, phrase = c.clone(), c.clone()
    action[:, 1] += 1
    phrase[:, 2] += 1   # not a neighbour of the motion node
    assert (m(ids, action, motion, valid) - out)[valid].abs().max() > 1e-4
    assert (m(ids, phrase, motion, valid) - out)[valid].abs().max() < 1e-6
    longer = torch.cat([c, torch.randn(4, 3, 512)], 1)
    assert (m(ids, longer, F.pad(motion, (0, 3)), valid) - out)[valid].abs().max() < 1e-5


@pytest.mark.parametrize('level', [1, 2, 3])
@torch.no_grad()
def test_hidden_nodes_cost_no_tokens(small, level, monkeypatch):
    """Hidden condition tokens are removed from the batch, and nothing else changes."""
    m, c, role, valid = small
    ids = torch.randint(20, valid.shape)
    shown = hgm3.visible_nodes(role, level)
    front, front_valid = m.trunk.condition_tokens(c, shown)
    out = m(ids, c, shown, valid)
    assert front.shape[1] == (shown > 0).sum(1).max()
    assert torch.equal(front_valid.sum(1), (shown > 0).sum(1))
    monkeypatch.setattr(model, 'drop_hidden', lambda front, shown: (front, shown))
    assert worst(m(ids, c, shown, valid)[valid], out[valid]) < 1e-5


def test_decoding_shows_more_nodes_step_by_step(small):
    m, c, role, valid = small
    shown = []
    forward = m.forward

    def remember(ids, c, role, *more, **rest):
        shown.append((role > 0).sum(1))
        return forward(ids, c, role, *more, **rest)

    m.forward = remember
    generate_base(m, c, role, valid.sum(1), steps=10)
    for step, counts in enumerate(shown):
        level = 1 + (step >= 2) + (step >= 5)
        assert torch.equal(counts[:4], (hgm3.visible_nodes(role, level) > 0).sum(1))
        assert (counts[4:] == 1).all()   # without text: the motion node, which is zero


# ------------------------------------------------------------------------------- hard token mining


def test_relative_loss_is_a_double_loop():
    g = seeded(0)
    predicted, loss = torch.randn(3, 7, generator=g), torch.rand(3, 7, generator=g)
    masked = torch.rand(3, 7, generator=g) < 0.6
    terms = []
    for p, l, asked in zip(predicted, loss, masked):
        chosen = asked.nonzero()[:, 0].tolist()
        for i in chosen:
            for j in chosen:
                harder = torch.sigmoid(p[i] - p[j])                       # Eq 5
                if i != j:
                    terms.append(-(harder if l[i] > l[j] else 1 - harder).log())
    assert worst(hgm3.relative_loss(predicted, loss, masked), torch.stack(terms).mean()) < 1e-5
    assert hgm3.relative_loss(predicted, loss, torch.zeros_like(masked)) == 0


def mining(dropout=0.0):
    torch.manual_seed(0)
    config = ModelConfig(**SMALL, dropout=dropout)
    return hgm3.HardTokenMining(MaskTransformer(config, torch.randn(20, 8)),
                                LossPredictor(config))


def batch():
    g = seeded(1)
    ids = torch.randint(20, (6, 12), generator=g)
    valid = first_of(12, [12, 5, 9, 12, 7, 12])
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


def test_the_teacher_is_the_students_moving_average():
    miner = mining()
    before = [p.clone() for p in miner.teacher.parameters()]
    with torch.no_grad():
        for p in miner.student.parameters():
            p.add_(torch.randn(p.shape))
    miner.update_teacher()
    for old, new, ours in zip(before, miner.student.parameters(), miner.teacher.parameters()):
        assert worst(ours, 0.999 * old + 0.001 * new) < 1e-6


@pytest.mark.parametrize('mask_by', ['loss', 'msd+loss'])
def test_how_many_hard_and_random_masks(mask_by):
    ids, c, _, valid = batch()
    difficulty = torch.arange(12.0).expand(6, 12)   # the last tokens are the hardest
    n = valid.sum(1)
    K = (0.8 * n).round().long()
    for step, share in ((0, 0.0), (500, 0.25), (1000, 0.5)):
        assert hgm3.hard_share(step, 1000) == share                       # Eq 8
        _, chosen = mask_tokens(mining().reconstructor, ids, c, valid, mask_by, 0.8,
                                difficulty=difficulty, hard_share=share)
        assert torch.equal(chosen.sum(1), K)
        assert not (chosen & ~valid).any()
        if mask_by == 'loss':
            for row, n_hard in enumerate((share * K).round().long()):
                assert chosen[row, n[row] - n_hard:n[row]].all()


def test_without_hard_tokens_it_is_momask_to_the_bit():
    """With a hard share of 0: the same masks, so the same weights after training."""
    weights = []
    for mask_by in ('random', 'loss'):
        miner = mining(dropout=0.1)
        m = miner.reconstructor
        net, extra = (miner, (None, batch()[0])) if mask_by == 'loss' else (m, ())
        optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
        g = seeded(0)
        torch.manual_seed(5)
        for _ in range(4):
            ids, c, role, valid = batch()
            masked, chosen = mask_tokens(m, ids, c, valid, mask_by, generator=g, hard_share=0.0,
                                         difficulty=miner.difficulty(ids, c, role, valid))
            targets = torch.where(chosen, ids, -100)
            net(masked, c, role, valid, targets, chosen.sum(), *extra).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(copy.deepcopy(m.state_dict()))
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
