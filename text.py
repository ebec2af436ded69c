"""Caption -> vector (512,), the only thing the transformers know of language. Two frozen encoders:

    'clip'  the text tower of OpenAI's ViT-B/32 through open_clip, un-normalised, as MoMask uses it. 350 MB on first use.
    'hash'  a deterministic hashed bag of words and word pairs: no weights, nothing to download; enough for toy and bandai,
            whose language is a small grammar. Pairs carry the order ("then kicks") that a bag of words loses.

Training never runs an encoder: `encode` keeps the vectors of a data set's unique captions in a file beside it.
"""
import hashlib
import os
import re

import numpy as np
import torch

DIM = 512


def words(caption):
    return re.findall(r"[a-z0-9']+", caption.lower())


def hash_encode(captions):
    """captions (list of N str) -> (N, 512) float32. Each word and each pair of neighbours adds its own fixed Gaussian
    vector; the sum is scaled to norm sqrt(512), so that single entries are of size 1 whatever the length."""
    table = {}

    def vector(feature):  # blake2b and not hash(): the same in every process, on every machine
        if feature not in table:
            seed = int.from_bytes(hashlib.blake2b(feature.encode(), digest_size=8).digest(), 'little')
            table[feature] = np.random.default_rng(seed).standard_normal(DIM)
        return table[feature]

    out = np.zeros((len(captions), DIM), np.float32)
    for i, caption in enumerate(captions):
        w = words(caption)
        x = sum((vector(f) for f in w + [f'{a} {b}' for a, b in zip(w, w[1:])]), np.zeros(DIM))
        out[i] = x * np.sqrt(DIM) / max(np.linalg.norm(x), 1e-8)
    return torch.from_numpy(out)


def clip_tower(pretrained='openai', device='cpu'):
    """The frozen CLIP text encoder: a function from a list of N captions to (N, 512) float32, un-normalised.
    The quickgelu variant, because OpenAI's weights were trained with it (plain ViT-B-32 silently has another GELU).
    pretrained=None gives random weights (tests)."""
    import open_clip
    name = 'ViT-B-32-quickgelu'
    try:
        model = open_clip.create_model(name, pretrained=pretrained).eval().requires_grad_(False)
    except Exception as e:
        raise RuntimeError(f'The CLIP weights could not be loaded ({type(e).__name__}): they are downloaded once, so this '
                           f'needs a network or a filled cache; or use --text_encoder=hash.') from None
    model.visual = None   # only the text tower is used
    model = model.to(device)
    tokenizer = open_clip.get_tokenizer(name)

    @torch.no_grad()
    def encode(captions):
        """model.encode_text without its padding: a caption is read off its last word, no word looks ahead, so columns behind
        the longest caption cannot matter. 16 instead of 77 of them: 32 captions in a fifth of the time."""
        parts = []
        for i in range(0, len(captions), 64):
            ids = tokenizer(captions[i:i + 64]).to(device)
            last = ids.argmax(-1)                                  # the end mark has the largest id
            L = int(last.max()) + 1
            with torch.autocast(ids.device.type, enabled=False):   # vectors are cached: the same whoever asks for them
                x = model.token_embedding(ids[:, :L]) + model.positional_embedding[:L]
                x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:L, :L]))
                parts.append(x[torch.arange(len(x)), last] @ model.text_projection)
        return torch.cat(parts).cpu() if parts else torch.zeros(0, DIM)
    return encode


def encode(captions, encoder, cache=None, device='cpu', tower=None):
    """captions (list of N str) -> (N, 512) float32 tensor. With cache (a folder) the vectors of unique captions are kept in
    <cache>/text_<encoder>.npz and only new ones are computed. tower replaces the CLIP tower (tests)."""
    if encoder == 'hash':
        return hash_encode(captions)  # 20,000 captions a second: not worth a file
    if encoder != 'clip':
        raise ValueError(f"text_encoder is '{encoder}', expected 'clip' or 'hash'.")
    path = os.path.join(cache, 'text_clip.npz') if cache else None
    known = {}
    if path and os.path.exists(path):
        with np.load(path) as f:
            known = dict(zip(f['captions'].tolist(), f['vectors']))
    new = sorted(set(captions) - set(known))
    if new:
        known.update(zip(new, (tower or clip_tower(device=device))(new).numpy()))
        if path:
            os.makedirs(cache, exist_ok=True)
            with open(f'{path}.{os.getpid()}.tmp', 'wb') as f:   # several ranks may come here at once
                np.savez(f, captions=np.array(list(known)), vectors=np.stack(list(known.values())))
            os.replace(f.name, path)
    return torch.from_numpy(np.stack([known[c] for c in captions])) if captions else torch.zeros(0, DIM)
