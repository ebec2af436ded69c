"""Captions -> condition tokens, all that the transformers know of language. Two frozen encoders:

    'clip'  the text tower of OpenAI's ViT-B/32 through open_clip, un-normalized, as MoMask uses it.
            350 MB on first use.
    'hash'  a deterministic hashed bag of words and word pairs: no weights, nothing to download;
            enough for toy and bandai, whose language is a small grammar. Pairs carry the order
            ("then kicks") that a bag of words loses.

A caption becomes c (m, 512) with c_valid (m,): m condition tokens, of which the first speaks of the
whole sentence. Today m = 1. Training never runs an encoder: vectors of a data set's captions are
kept in a file beside it.
"""
import hashlib
import os
import re

import numpy as np
import torch

from configurator import UserError
from runtime import atomic_write

DIM = 512


def condition(captions, encoder, cache=None, device='cpu', tower=None):
    """captions (list of N str) -> c (N, m, 512) float32, c_valid (N, m) bool, on the CPU.

    encoder: 'clip' or 'hash'. cache: a folder in which CLIP's vectors are kept, so that only new
    captions are computed. tower: takes the place of `clip_tower` (tests). UserError: no weights.
    """
    if encoder == 'hash':
        vectors = hash_encode(captions)   # 20,000 captions a second: not worth a file
    else:
        vectors = cached_encode(captions, cache, tower or clip_tower, device)
    c = vectors[:, None]
    return c, torch.ones(c.shape[:2], dtype=torch.bool)


def words(caption):
    return re.findall(r"[a-z0-9']+", caption.lower())


def hash_encode(captions):
    """captions (list of N str) -> (N, 512) float32. Each word and each pair of neighbours adds its
    own fixed Gaussian vector; the sum is scaled to norm sqrt(512), so that single entries are of
    size 1 whatever the length."""
    table = {}

    def vector(feature):   # blake2b and not hash(): the same in every process, on every machine
        if feature not in table:
            seed = hashlib.blake2b(feature.encode(), digest_size=8).digest()
            generator = np.random.default_rng(int.from_bytes(seed, 'little'))
            table[feature] = generator.standard_normal(DIM)
        return table[feature]

    out = np.zeros((len(captions), DIM), np.float32)
    for row, caption in zip(out, captions):
        singles = words(caption)
        pairs = [f'{a} {b}' for a, b in zip(singles, singles[1:])]
        total = sum((vector(feature) for feature in singles + pairs), np.zeros(DIM))
        row[:] = total * np.sqrt(DIM) / max(np.linalg.norm(total), 1e-8)
    return torch.from_numpy(out)


def cached_encode(captions, cache, make_tower, device):
    """CLIP vectors (N, 512) of the captions; the tower is only built where one is new."""
    path = os.path.join(cache, 'text_clip.npz') if cache else None
    known = {}
    if path and os.path.exists(path):
        with np.load(path) as f:
            known = dict(zip(f['captions'].tolist(), f['vectors']))

    new = sorted(set(captions) - set(known))
    if new:
        encode = make_tower(device=device)
        known.update(zip(new, encode(new).numpy()))
    if new and path:
        with atomic_write(path) as f:   # several ranks may come here at once
            np.savez(f, captions=list(known), vectors=np.stack(list(known.values())))
    rows = [known[caption] for caption in captions]
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, DIM)


def clip_tower(pretrained='openai', device='cpu'):
    """The frozen CLIP text encoder: a function from a list of N captions to (N, 512) float32,
    un-normalized. The quickgelu variant, because OpenAI's weights were trained with it (plain
    ViT-B-32 silently has another GELU). pretrained=None gives random weights (tests)."""
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
        return x[torch.arange(len(x)), last] @ model.text_projection

    def encode(captions):
        # vectors are cached: they must be the same whoever asks for them, so no autocast
        with torch.autocast(torch.device(device).type, enabled=False):
            parts = [encode_some(captions[i:i + 64]) for i in range(0, len(captions), 64)]
        return torch.cat(parts).cpu() if parts else torch.zeros(0, DIM)

    return encode
