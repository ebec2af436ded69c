"""Captions -> condition tokens, all that the transformers know of language.

A caption becomes c (m, 512) with c_valid (m,): m condition tokens, the first of which speaks of the
whole sentence. `text` says what follows it:

    'sentence'  nothing: the papers' letter, and what official weights know
    'clauses'   its clauses, each encoded by itself, in order: one vector of a sentence of three
                actions says little of which comes when
    'words'     its words (CLIP: the states of its tokens, which have read the words before them)
    'graph'     the nodes of its semantic graph (hgm3.py)

and two frozen encoders make vectors of them:

    'clip'  the text tower of OpenAI's ViT-B/32 through open_clip, un-normalized, as MoMask uses it.
            350 MB on first use.
    'hash'  a deterministic hashed bag of words and word pairs: no weights, nothing to download;
            enough for toy and bandai, whose language is a small grammar. Pairs carry the order
            ("then kicks") that a bag of words loses.

Training never runs an encoder: a data set's captions are encoded once, each clause or word that
they share a single time.
"""
import hashlib
import os
import re

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from lib.configurator import UserError
from lib.runtime import atomic_write, read_arrays

DIM = 512


# words that the hash encoder does not hear: which of them somebody types is chance
FUNCTION_WORDS = set('a an the he she they it is are his her their its to on with of at in'.split())
MOST_TOKENS = 24   # condition tokens behind the sentence; what comes later is left out
CLAUSE_END = (r'[,.;!?]|\b(?:and|then|next|before|after that|afterwards|after|while|finally|lastly|'
              r'first)\b')


def condition(captions, encoder, text='sentence', nodes=None, cache=None, device='cpu',
              tower=None):
    """captions (list of N str) -> c (N, m, 512) float32, c_valid (N, m) int8, on the CPU."""
    vectors, index, c_valid = encode(captions, encoder, text, nodes, cache, device, tower)
    return vectors[index], c_valid


def encode(captions, encoder, text='sentence', nodes=None, cache=None, device='cpu', tower=None):
    """captions (list of N str) -> vectors (U, 512) float32, index (N, m) int, c_valid (N, m) int8:
    caption i has the condition tokens vectors[index[i]]. Vector 0 is zeros, and stands where a
    caption has no more; there c_valid is 0. It is 1 for all others, or a node's role.

    encoder: 'clip' or 'hash'. text: 'sentence', 'clauses', 'words' or 'graph', for which nodes has
    a list of (str, role) for each caption. cache: a folder in which CLIP's vectors are kept, so
    that only new captions are computed. tower: takes the place of `clip_tower` (tests). UserError:
    no weights, or (hash) a caption without a word, which would be no condition at all.
    """
    tower = tower or clip_tower
    if encoder == 'clip' and text == 'words':
        vectors, index = word_states(captions, tower(device=device))
        return vectors, index, (index > 0).to(torch.int8)
    if text != 'graph':
        nodes = [[(piece, 1) for piece in pieces(caption, text)] for caption in captions]
    behind = [some[:MOST_TOKENS] for some in nodes]
    parts = [[caption, *(piece for piece, _ in some)] for caption, some in zip(captions, behind)]
    roles = [torch.tensor([1, *(role for _, role in some)], dtype=torch.int8) for some in behind]
    different = dict.fromkeys(piece for part in parts for piece in part)
    place = {piece: 1 + i for i, piece in enumerate(different)}
    if encoder == 'hash':
        vectors = hash_encode(list(place))   # 20,000 captions a second: not worth a file
        heard = dict(zip(place, vectors.any(1).tolist()))
        for caption in captions:
            if not heard[caption]:
                raise UserError(f"'{caption:.80}' has no word that the hash encoder hears, which "
                                'reads a-z and 0-9: say it in English, or use --text_encoder=clip.')
    else:
        vectors = cached_encode(list(place), cache, tower, device)
    rows = [torch.tensor([place[piece] for piece in part]) for part in parts]
    index = pad_sequence(rows, batch_first=True)
    return F.pad(vectors, (0, 0, 1, 0)), index, pad_sequence(roles, batch_first=True)


def words(caption):
    return re.findall(r"[a-z0-9']+", caption.lower())


def stem(word):
    """jogs, jogging, jog -> jog; raises, raising, raise -> rais: so that a prompt may inflect its
    words in another way than the training captions do."""
    return re.sub(r'(\w\w+?)(\w)\2?(?:ing|es|ed|s|e)?$', r'\1\2', word)


def pieces(caption, text):
    """What follows the sentence, a list of str: nothing, its clauses, or its words."""
    found = []
    if text == 'words':
        found = words(caption)
    if text == 'clauses':
        clauses = re.split(CLAUSE_END, caption.lower())
        found = [clause.strip() for clause in clauses if words(clause)]
    return found


def word_states(captions, tower):
    """As `encode`, for the words of CLIP: every caption has states of its own."""
    unique = list(dict.fromkeys(captions))
    states = [part[:1 + MOST_TOKENS] for part in tower(unique, states=True)]
    first = 1 + np.cumsum([0] + [len(part) for part in states])
    span = {caption: torch.arange(a, b) for caption, a, b in zip(unique, first, first[1:])}
    vectors = F.pad(torch.cat(states), (0, 0, 1, 0))
    return vectors, pad_sequence([span[caption] for caption in captions], batch_first=True)


def hash_encode(captions):
    """captions (list of N str) -> (N, 512) float32. Each word's stem and each pair of neighbours
    adds its own fixed Gaussian vector; the sum is scaled to norm sqrt(512), so that single entries
    are of size 1 whatever the length."""
    table = {}

    def vector(feature):   # blake2b and not hash(): the same in every process, on every machine
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
    """CLIP vectors (N, 512) of the captions; the tower is only built where one is new."""
    path = os.path.join(cache, 'text_clip.npz') if cache else None
    known = {}
    if path and os.path.exists(path):
        again = 'delete it, it is made again'
        captions_there, vectors = read_arrays(path, again, ('captions', 'vectors'))
        good = vectors.shape == (captions_there.size, DIM) and vectors.dtype == np.float32
        if not good or captions_there.dtype.kind != 'U' or not np.isfinite(vectors).all():
            raise UserError(f'{path} holds no vectors of captions: {again}.')
        known = dict(zip(captions_there.tolist(), vectors))

    new = sorted(set(captions) - set(known))
    if new:
        tower = make_tower(device=device)
        known.update(zip(new, tower(new).numpy()))
    if new and path:
        with atomic_write(path) as f:   # several ranks may come here at once
            np.savez(f, captions=list(known), vectors=np.stack(list(known.values())))
    rows = [known[caption] for caption in captions]
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, DIM)


def clip_tower(pretrained='openai', device='cpu'):
    """The frozen CLIP text encoder: a function from a list of N captions to (N, 512) float32,
    un-normalized; with states=True to a list of N tensors (1 + words, 512), the same and then the
    states of its tokens. The quickgelu variant, because OpenAI's weights were trained with it
    (plain ViT-B-32 silently has another GELU). pretrained=None gives random weights (tests)."""
    import open_clip   # 3 seconds, and only needed where a caption is new
    name = 'ViT-B-32-quickgelu'
    try:
        model = open_clip.create_model(name, pretrained=pretrained)
    except Exception as e:
        raise UserError(f'The CLIP weights could not be loaded ({type(e).__name__}): they are '
                        'downloaded once, so this needs a network or a filled cache; or use '
                        '--text_encoder=hash.') from None
    model = model.eval().requires_grad_(False)
    model.visual = None   # only the text tower is used
    model = model.to(device)
    tokenizer = open_clip.get_tokenizer(name)

    @torch.no_grad()
    def encode_some(captions):
        """model.encode_text without its padding: a caption is read off its last word and no word
        looks ahead, so columns behind the longest caption cannot matter. 16 instead of 77 of them:
        32 captions in a fifth of the time."""
        ids = tokenizer(captions).to(device)
        last = ids.argmax(-1)   # the end mark has the largest id
        L = int(last.max()) + 1
        x = model.token_embedding(ids[:, :L]) + model.positional_embedding[:L]
        x = model.transformer(x, attn_mask=model.attn_mask[:L, :L])
        x = model.ln_final(x)
        sentence = x[torch.arange(len(x)), last] @ model.text_projection
        states = [row[1:end] for row, end in zip(x, last)]   # between start and end marks
        return sentence, states

    def encode(captions, states=False):
        sentences = [torch.zeros(0, DIM)]
        states_of_words = []
        for i in range(0, len(captions), 64):
            # vectors are cached: they must be the same whoever asks for them, so no autocast
            with torch.autocast(torch.device(device).type, enabled=False):
                sentence, some = encode_some(captions[i:i + 64])
            sentences.append(sentence.cpu())
            states_of_words += [part.cpu() for part in some]
        sentences = torch.cat(sentences)
        if not states:
            return sentences
        return [torch.cat([s[None], w]) for s, w in zip(sentences, states_of_words)]

    return encode
