"""HGM3 (Hierarchical Generative Masked Motion Model): what it adds to MoMask, in three parts.

    3.2 hard token mining   a second network G guesses where the masked transformer (the paper's F)
                            will fail, and those tokens are masked more often (`--mask_by=loss`)
    3.3 semantic graph      a caption as motion, action and specific nodes, which a graph attention
                            network lets talk to each other (`--text=graph`)
    3.4 hierarchy           decoding hears of the motion first, then of actions, then of all

B batch, n motion tokens, m nodes of the longest caption.

A caption's graph is a tree: the sentence, under it its verbs, under each what is said of it. The
nodes in order (the sentence, then each verb followed by its specifics) and one integer a node
therefore describe it. That `role` is 1 for the motion, 2 for an action, FIRST_EDGE + k for a
specific that hangs on the action before it by edge k; 0 is no node, and a negative role one that
the graph holds and the transformer is not shown.
"""
import copy
import re
from collections import Counter

import torch
import torch.nn as nn
import torch.nn.functional as F

import msd
from lib.text import stem

# ---------------------------------------------------------------------- 3.2 hard token mining


def relative_loss(predicted, loss, masked):
    """Eq 5: does G order the masked tokens by their loss? predicted, loss (B, n), masked (B, n)
    bool -> scalar. The paper sums over pairs; this is their mean, so it weighs like L_rec."""
    difference = predicted[:, :, None] - predicted[:, None]               # (B, n, n)
    harder = (loss[:, :, None] > loss[:, None]).to(difference.dtype)      # 1_ij
    pair = masked[:, :, None] & masked[:, None]
    pair = pair & ~torch.eye(masked.shape[1], dtype=torch.bool, device=masked.device)
    each = F.binary_cross_entropy_with_logits(difference, harder, reduction='none')
    return (each * pair).sum() / pair.sum().clamp(min=1)


def hard_share(step, steps, first=0.0, last=0.5):
    """Eq 8: alpha_t, the share of the masked tokens that the teacher chooses."""
    return first + step / steps * (last - first)


class HardTokenMining(nn.Module):
    """The masked transformer with its loss predictor: `student` G learns from its losses,
    `teacher`, G's moving average, says what to mask. The transformer's gradient knows of
    neither."""

    def __init__(self, reconstructor, predictor, momentum=0.999):
        super().__init__()
        self.reconstructor = reconstructor
        self.student = predictor
        self.teacher = copy.deepcopy(predictor).requires_grad_(False)
        self.momentum = momentum

    @torch.no_grad()
    def difficulty(self, ids, c, c_valid, valid):
        """What the teacher expects of clean tokens (B, n), z-scored: the larger, the harder."""
        return msd.zscore(self.teacher(ids, c, c_valid, valid).float(), valid)

    @torch.no_grad()
    def update_teacher(self):
        """Eq 6, after an optimizer's step."""
        for ours, new in zip(self.teacher.parameters(), self.student.parameters()):
            ours.lerp_(new, 1 - self.momentum)

    def forward(self, masked, c, c_valid, valid, targets, n_targets, described, ids):
        """Eq 7: L_rec + L_pred. masked ids (B, n) and what they were, ids; targets (B, n), -100
        where nothing is asked."""
        logits = self.reconstructor(masked, c, c_valid, valid, described=described)
        flat = logits.flatten(0, 1).float(), targets.flatten()
        loss = F.cross_entropy(*flat, reduction='none').view(targets.shape)   # Eq 3
        rec = loss.sum() / n_targets                                          # Eq 4
        predicted = self.student(ids, c, c_valid, valid).float()
        asked = targets >= 0
        share = asked.sum() / n_targets   # below 1 where several ranks share a batch
        return rec + relative_loss(predicted, loss.detach(), asked) * share


# ----------------------------------------------------------------------------- 3.3 semantic graph

# PropBank's semantic roles: ARG0 to ARG4 who does what to whom, with what, from and to where; then
# where, how, when, which way, adverbs
EDGES = ('ARG0', 'ARG1', 'ARG2', 'ARG3', 'ARG4', 'LOC', 'MNR', 'TMP', 'DIR', 'ADV', 'OTHERS',
         'MA')   # between the motion and an action
MOTION, ACTION, FIRST_EDGE = 1, 2, 3

# The paper's parser of semantic roles is dead (AllenNLP). This reads roles off part-of-speech tags,
# which the data sets have: a phrase's edge is that of the word it begins with.
EDGE_OF_WORD = {}
for edge, words in {
        'ARG2': 'with using by for',
        'ARG3': 'from off',
        'ARG4': 'to into onto towards toward',
        'LOC': 'in on at over under across near behind between through along beside',
        'MNR': 'like as quickly slowly fast',
        'TMP': 'then again twice first next finally lastly once before after during until while '
               'when',
        'DIR': 'forward forwards backward backwards left right up down ahead back around away '
               'sideways straight clockwise counterclockwise',
        }.items():
    EDGE_OF_WORD.update(dict.fromkeys(words.split(), edge))
SIDES = {'left', 'right', 'side', 'front', 'back'}
CONJUNCTIONS = ('CCONJ', 'SCONJ', 'PUNCT')
ORDER = {'then', 'next', 'finally', 'lastly', 'after', 'before', 'while'}


def graph(tokens):
    """'a/DET man/NOUN walk/VERB forward/ADV' -> [('walk', 2), ('a man', 3), ('forward', 11)]: the
    nodes behind the motion node. A caption without a verb has none."""
    nodes = []
    waiting = []      # phrases for the next verb
    joined = True     # has a conjunction come since the last verb, or no verb yet?
    for phrase in phrases(tokens):
        word, tag = phrase[0]
        if tag == 'VERB':
            nodes.append((word, ACTION))
            nodes += [specific(p, 'ARG0') for p in waiting]
            if phrase[1:]:
                nodes.append(specific(phrase[1:], 'ARG1'))
            waiting = []
            joined = False
            continue
        joined = joined or tag in CONJUNCTIONS or word in ORDER
        if tag in CONJUNCTIONS:
            phrase = phrase[1:]
        if phrase and joined:
            waiting.append(phrase)
        elif phrase:
            nodes.append(specific(phrase, 'ARG1'))
    if nodes:
        nodes += [specific(p, 'ARG1') for p in waiting]
    return nodes


def phrases(tokens):
    """Tagged words in stretches that begin at a verb, a preposition, an adverb or a conjunction. An
    adverb stands alone."""
    found = [[]]
    for token in tokens.split():
        word, _, tag = token.rpartition('/')
        after_adverb = found[-1] and found[-1][0][1] == 'ADV'
        if tag in ('VERB', 'ADP', 'ADV', *CONJUNCTIONS) or after_adverb:
            found.append([])
        if tag != 'AUX':
            found[-1].append((word, tag))
    return [phrase for phrase in found if phrase]


def specific(phrase, bare):
    """A node for a phrase; `bare` is its edge where it begins with neither preposition nor
    adverb."""
    word, tag = phrase[0]
    edge = bare
    if tag == 'ADP' or tag == 'ADV':
        edge = EDGE_OF_WORD.get(word, 'ADV' if tag == 'ADV' else 'OTHERS')
    if edge == 'ARG4' and SIDES & {w for w, _ in phrase}:
        edge = 'DIR'   # "to the left" is no place
    return ' '.join(w for w, _ in phrase), FIRST_EDGE + EDGES.index(edge)


def tag_table(captions):
    """Each word's most frequent tag in training captions ('walk/VERB left/ADJ', ...), by stem."""
    counts = {}
    for tokens in captions:
        for token in tokens.split():
            word, _, tag = token.rpartition('/')
            counts.setdefault(stem(word), Counter())[tag] += 1
    return {word: count.most_common(1)[0][0] for word, count in counts.items()}


def tagged(prompt, table):
    """A prompt with the tags of the table; a word that it lacks counts as a noun, a comma as a
    conjunction."""
    words = re.findall(r"[a-z0-9']+|[,.;]", prompt.lower())
    tags = ['PUNCT' if word in ',.;' else table.get(stem(word), 'NOUN') for word in words]
    return ' '.join(f'{word}/{tag}' for word, tag in zip(words, tags))


class GraphAttention(nn.Module):
    """Eqs 9-11: every node looks at those it hangs together with."""

    def __init__(self, dim=512):
        super().__init__()
        self.W = nn.Linear(dim, dim, bias=False)                          # Eq 9
        self.M = nn.Linear(2 * dim, 1, bias=False)
        self.M_r = nn.Linear(2 * dim, len(EDGES), bias=False)

    def forward(self, c, role):
        """c (B, m, dim), role (B, m) -> C (B, m, dim)."""
        kind = edges(role)                                                # (B, m, m)
        h = self.W(c)

        def pairs(layer):   # layer([h_i; h_j]) for all i, j, from its two halves: (B, m, m, out)
            of_i, of_j = layer.weight.chunk(2, 1)
            return F.leaky_relu((h @ of_i.T)[:, :, None] + (h @ of_j.T)[:, None], 0.2)

        by_edge = pairs(self.M_r).gather(-1, kind.clamp(min=0)[..., None])
        e = (pairs(self.M) + by_edge)[..., 0]                             # Eq 10
        e = e.masked_fill(kind < 0, -torch.inf).softmax(-1)
        e = e.nan_to_num()                                                # no neighbours
        return F.elu(e.to(h.dtype) @ h) + c                               # Eq 11


def edges(role):
    """role (B, m) -> the edge between every two nodes (B, m, m): its number, -1 where there is
    none."""
    m = role.shape[1]
    role = role.abs()
    place = torch.arange(m, device=role.device).expand(role.shape)
    parent = torch.where(role == ACTION, place, 0).cummax(1).values       # a specific's action
    parent = torch.where(role == ACTION, 0, parent)
    edge = torch.where(role == ACTION, EDGES.index('MA'), role.long() - FIRST_EDGE)
    is_child = role >= ACTION
    is_parent = (parent[..., None] == place[:, None]) & is_child[..., None]   # [child, parent]
    kind = torch.where(is_parent, edge[..., None], -1)
    return torch.maximum(kind, kind.mT)


def show(role, level):
    """Which nodes the transformer is shown: level 1 C^m, 2 [C^m; C^a], 3 all; (B, m) role, level an
    int. The others stay in the graph, with a negative role."""
    role = role.abs()
    visible = role.clamp(max=3) <= level
    return torch.where(visible, role, -role)


# ----------------------------------------------------------------------- 3.4 hierarchical inference


def level(step, motion_steps=2, action_steps=5):
    """Eq 14: what decoding step `step`, counted from 0, is conditioned on."""
    if step < motion_steps:
        return 1
    return 2 if step < action_steps else 3
