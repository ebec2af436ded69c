"""HGM3 (Hierarchical Generative Masked Motion Model): what it adds to MoMask, in three parts.

    3.2 hard token mining   a second network G predicts which tokens the masked transformer F will
                            get wrong, and training masks those more often (--mask_by=loss)
    3.3 semantic graph      the caption as a tree of nodes, mixed by graph attention (--text=graph)
    3.4 hierarchy           the first decoding steps see the motion node only, later ones the
                            actions too, the last ones everything

B batch, n motion tokens, m nodes of the longest caption.

The graph of a caption (lib/text.py makes it) is a tree of three levels: the whole sentence, its
verbs, and the phrases that specify each verb. Nodes come in the order sentence, then each verb
followed by its phrases, so one integer per node, its role, describes the tree:

    0                no node
    MOTION           the sentence
    ACTION           a verb, child of the sentence
    FIRST_EDGE + k   a phrase, child of the verb before it by an edge of kind k
    negative         the node is in the graph, but the transformer is not shown it
"""
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

import msd

# The same numbers as in lib/text.py, which writes the roles.
MOTION, ACTION, FIRST_EDGE = 1, 2, 3
N_EDGES = 12               # eleven kinds of phrases, and sentence to verb, which comes last

TEACHER_MOMENTUM = 0.999   # HGM3 Eq 6's lambda, which the paper does not state
HARD_FIRST = 0.0           # HGM3 Eq 8's alpha_0
HARD_LAST = 0.5            # HGM3 Eq 8's alpha_T
MOTION_STEPS = 2           # HGM3 Eq 14: decoding steps that see the motion node only
ACTION_STEPS = 5           # and the step up to which actions are added


# ---------------------------------------------------------------------------- 3.2 hard token mining


def relative_loss(predicted, loss, masked):
    """HGM3 Eq 5: how well G orders the masked tokens by their loss. predicted, loss (B, n), masked
    (B, n) bool -> scalar. The paper sums over pairs; this is the mean, which is as large as L_rec.
    """
    difference = predicted[:, :, None] - predicted[:, None]               # (B, n, n)
    harder = (loss[:, :, None] > loss[:, None]).to(difference.dtype)      # 1_ij
    pair = masked[:, :, None] & masked[:, None]
    pair = pair & ~torch.eye(masked.shape[1], dtype=torch.bool, device=masked.device)
    each = F.binary_cross_entropy_with_logits(difference, harder, reduction='none')
    return (each * pair).sum() / pair.sum().clamp(min=1)


def hard_share(step, steps):
    """HGM3 Eq 8: alpha_t, the share of the masked tokens that the teacher chooses."""
    return HARD_FIRST + step / steps * (HARD_LAST - HARD_FIRST)


class HardTokenMining(nn.Module):
    """The masked transformer F together with its loss predictor G.

    `student` is G and learns from the losses of F. `teacher`, the moving average of G, says which
    tokens to mask. No gradient flows from either into F.
    """

    def __init__(self, reconstructor, predictor):
        super().__init__()
        self.reconstructor = reconstructor
        self.student = predictor
        self.teacher = copy.deepcopy(predictor).requires_grad_(False)

    @torch.no_grad()
    def difficulty(self, ids, c, role, valid):
        """The loss that the teacher expects of clean tokens (B, n), z-scored: higher is harder."""
        return msd.zscore(self.teacher(ids, c, role, valid).float(), valid)

    @torch.no_grad()
    def update_teacher(self):
        """HGM3 Eq 6, to be called after each step of the optimizer."""
        for ours, new in zip(self.teacher.parameters(), self.student.parameters()):
            ours.lerp_(new, 1 - TEACHER_MOMENTUM)

    def forward(self, masked, c, role, valid, targets, n_targets, spectrum, ids):
        """HGM3 Eq 7: L_rec + L_pred. masked, ids (B, n): the masked tokens and the clean ones;
        targets (B, n): -100 where the loss is not taken; spectrum as in MaskTransformer."""
        logits = self.reconstructor(masked, c, role, valid, spectrum=spectrum)
        flat = logits.flatten(0, 1).float(), targets.flatten()
        loss = F.cross_entropy(*flat, reduction='none').view(targets.shape)   # HGM3 Eq 3
        rec = loss.sum() / n_targets                                          # HGM3 Eq 4
        predicted = self.student(ids, c, role, valid).float()
        asked = targets >= 0
        share = asked.sum() / n_targets   # below 1 where several ranks share a batch
        return rec + relative_loss(predicted, loss.detach(), asked) * share


# ------------------------------------------------------------------------------- 3.3 semantic graph


class GraphAttention(nn.Module):
    """HGM3 Eqs 9-11: each node attends to its neighbours in the graph."""

    def __init__(self, dim=512):
        super().__init__()
        self.W = nn.Linear(dim, dim, bias=False)                          # HGM3 Eq 9
        self.M = nn.Linear(2 * dim, 1, bias=False)
        self.M_r = nn.Linear(2 * dim, N_EDGES, bias=False)

    def forward(self, c, role):
        """c (B, m, dim), role (B, m) -> C (B, m, dim)."""
        kind = edges(role)                                                # (B, m, m)
        h = self.W(c)

        def pairs(layer):   # layer([h_i; h_j]) of all pairs from its two halves: (B, m, m, out)
            of_i, of_j = layer.weight.chunk(2, 1)
            return F.leaky_relu((h @ of_i.T)[:, :, None] + (h @ of_j.T)[:, None], 0.2)

        by_edge = pairs(self.M_r).gather(-1, kind.clamp(min=0)[..., None])
        e = (pairs(self.M) + by_edge)[..., 0]                             # HGM3 Eq 10
        e = e.masked_fill(kind < 0, -torch.inf).softmax(-1)
        e = e.nan_to_num()                                                # nodes without neighbours
        return F.elu(e.to(h.dtype) @ h) + c                               # HGM3 Eq 11


def edges(role):
    """role (B, m) -> the kind of the edge between every two nodes (B, m, m), -1 where there is no
    edge."""
    m = role.shape[1]
    role = role.abs()
    place = torch.arange(m, device=role.device).expand(role.shape)
    parent = torch.where(role == ACTION, place, 0).cummax(1).values       # of a phrase: its verb
    parent = torch.where(role == ACTION, 0, parent)                       # of a verb: the sentence
    kind = torch.where(role == ACTION, N_EDGES - 1, role.long() - FIRST_EDGE)

    is_child = role >= ACTION
    is_parent = (parent[..., None] == place[:, None]) & is_child[..., None]   # [child, parent]
    kind = torch.where(is_parent, kind[..., None], -1)
    return torch.maximum(kind, kind.mT)


# ----------------------------------------------------------------------- 3.4 hierarchical inference


def visible_nodes(role, level):
    """Which nodes the transformer is shown: level 1 is C^m, 2 is [C^m; C^a], 3 is all. role (B, m)
    -> role (B, m) in which the other nodes are negative: they stay in the graph."""
    role = role.abs()
    visible = role.clamp(max=3) <= level
    return torch.where(visible, role, -role)


def decoding_level(step):
    """HGM3 Eq 14: the level of decoding step `step`, counted from 0."""
    if step < MOTION_STEPS:
        return 1
    return 2 if step < ACTION_STEPS else 3


def training_level(step):
    """HGM3 Eqs 12-13 sum the losses of the three levels. Here training steps alternate between
    them, which costs a third and was better on toy (LOG.md)."""
    return 1 + step % 3
