"""Decoding: from text to tokens, and from a prompt to motion.

    generate_base       Algorithm 2: all base tokens hidden, then filled in over a few rounds
    generate_residual   MoMask 3.4: layer after layer on top of them
    Pipeline            tokenizer + transformers + length estimator: prompts in, features out;
                        edits a span of a motion, joins motions into one of any length

B prompts, N tokens of the longest, V codes. Text is c (B, m, 512) with c_valid (B, m): model.py.
"""
import math
import os

import torch

import hgm3
import msd
from lib.configurator import UserError
from lib.data import FRAMES_PER_TOKEN, equal_lengths
from model import LengthEstimator, LossPredictor, MaskTransformer, ModelConfig, ResTransformer
from msd import gumbel_like
from lib.runtime import config_from, load, load_named
from lib.text import condition
from vq import load_tokenizer

# ---------------------------------------------------------------------------- sampling and guidance


def sample(logits, top_share, temperature, generator):
    """Draw ids (B, n) from softmax(logits / temperature) over the largest `top_share` of V, logits
    (B, n, V). The arg-max of logits plus Gumbel noise is such a draw; noise is only made for those
    that can win: 52 of 512."""
    n_top = max(1, math.ceil(top_share * logits.shape[-1]))
    top, code = logits.topk(n_top, -1)
    winner = (top / temperature + gumbel_like(top, generator)).argmax(-1, keepdim=True)
    return code.gather(-1, winner)[..., 0]


def guided(model, scale, ids, c, c_valid, valid, **more):
    """Classifier-free guidance in one pass: logits uncond + s (cond - uncond), float32. MoMask Eq 5
    with s + 1 written s, as its code does. No text is a zero vector, of which only the sentence's
    token is there."""
    no_valid = torch.zeros_like(c_valid)
    no_valid[:, 0] = 1
    c = torch.cat([c, torch.zeros_like(c)])
    logits = model(twice(ids), c, torch.cat([c_valid, no_valid]), twice(valid), **more)
    cond, uncond = logits.float().chunk(2)
    return uncond + scale * (cond - uncond)


def twice(x):
    return torch.cat([x, x])


# -------------------------------------------------------------------------------------- base tokens


def decoding_of(config):
    """The settings (a dict) that `Pipeline.generate` takes."""
    names = ('steps', 'cond_scale', 'res_scale', 'top_share', 'temperature', 'anneal',
             'res_temperature', 'res_layers', 'das_sampling', 'lambda_D', 'beta', 'sigma_max',
             'msd_decode', 'motion_steps', 'action_steps')
    return {name: config[name] for name in names}


@torch.no_grad()
def generate_base(model, c, c_valid, n, known=None, steps=10, cond_scale=4.0, top_share=0.1,
                  temperature=1.0, anneal=0.0, das_sampling=False, lambda_D=0.5, beta=0.5,
                  sigma_max=0.5, msd_decode='kept', motion_steps=2, action_steps=5, generator=None):
    """Algorithm 2. c (B, m, 512), c_valid (B, m), n (B,) tokens wanted -> ids (B, N), [PAD] behind
    each end, where N is the longest n. known (B, N): tokens that are given and never masked, -1
    where one is wanted. All other settings: config/decoding.py.

    Every step predicts all masked tokens, then hides the least confident again, fewer each time.
    Nothing waits for a GPU inside the loop.
    """
    valid = torch.arange(int(n.max()), device=c.device) < n[:, None]
    wanted = valid
    ids = torch.where(valid, model.MASK, model.PAD)
    if known is not None:
        wanted = valid & (known < 0)
        ids = torch.where(valid & ~wanted, known, ids)
    n_wanted = wanted.sum(1)
    guess = ids
    score = torch.zeros(valid.shape, device=c.device)
    shown = c_valid

    for step in range(steps):
        share = math.cos(math.pi / 2 * step / max(steps - 1, 1))         # 1 -> 0
        n_masked = (share * n_wanted).round().clamp(min=1).long()
        masked = msd.top_k(-score, n_masked, wanted)
        ids = torch.where(masked, model.MASK, ids)

        described = None
        if das_sampling or model.config.spectral_attn:
            f, seen = model.spectrum(guess if msd_decode == 'guess' else ids)
        if model.config.spectral_attn:
            described = twice(f), twice(seen)
        if model.config.graph:                                           # HGM3 Eq 14
            shown = hgm3.show(c_valid, hgm3.level(step, motion_steps, action_steps))

        logits = guided(model, cond_scale, ids, c, shown, valid, described=described)
        log_p = logits.log_softmax(-1)                                   # (B, N, V)
        T = temperature * (1 - anneal * step / steps)
        if das_sampling:
            p_max = log_p.amax(-1).exp()
            omega = msd.complexity(f, model.config.omega)                # Eq 8
            b = msd.exploration(omega, seen & valid, p_max, masked, lambda_D)   # Eqs 15-17
            T = T * (1 + beta * b[..., None])                            # Eqs 18, 20
        drawn = sample(log_p, top_share, T, generator)
        ids = torch.where(masked, drawn, ids)

        confidence = log_p.gather(-1, drawn[..., None])[..., 0]
        if das_sampling:
            sigma = sigma_max * b                                        # Eqs 19, 21
            confidence = confidence + sigma * gumbel_like(confidence, generator)
        score = torch.where(masked, confidence, torch.inf)               # kept tokens stay kept
        guess = ids
    return ids


# ---------------------------------------------------------------------------------- residual tokens


@torch.no_grad()
def generate_residual(model, ids, c, c_valid, n, known=None, n_layers=-1, cond_scale=5.0,
                      top_share=0.1, temperature=1.0, generator=None):
    """MoMask 3.4: base ids (B, N), n (B,) tokens each -> (B, N, 1 + n_layers), one guided pass
    a layer, sampled; 0 behind each end. n_layers: how many of the residual layers; -1 is all.
    known (B, N, Q): tokens that are given, -1 where one is wanted."""
    V, Q = model.config.n_codes, model.config.n_quantizers
    valid = torch.arange(ids.shape[1], device=ids.device) < n[:, None]
    layers = ids[..., None].clamp(max=V).repeat(1, 1, Q)   # [PAD] is V + 1 there, V here
    n_layers = Q - 1 if n_layers < 0 else n_layers
    for q in range(1, 1 + n_layers):
        logits = guided(model, cond_scale, layers, c, c_valid, valid, q=q)[..., :V]   # never [PAD]
        drawn = sample(logits, top_share, temperature, generator)
        layers[..., q] = drawn if known is None else torch.where(known[..., q] < 0, drawn,
                                                                 known[..., q])
    return torch.where(valid[..., None], layers, 0)[..., :1 + n_layers]


# ----------------------------------------------------------------------------------------- pipeline


class Pipeline:
    """Everything between a prompt and motion features. mask, res and length may be None: then there
    is only reconstruction, base tokens only, or lengths must be given. meta: name, skeleton, fps,
    n_joints, dim, units_per_metre, max_frames of the data."""

    def __init__(self, tokenizer, mask, res, length, text_encoder, meta, device='cpu',
                 text='sentence', tags=None):
        networks = [net and net.to(device).eval() for net in (tokenizer, mask, res, length)]
        self.vq, self.mask, self.res, self.length = networks
        self.text_encoder = text_encoder
        self.text = text
        self.tags = tags       # graph: each word's part of speech
        self.meta = meta
        self.val = None        # the masked transformer's validation cross-entropy
        self.teacher = None    # HGM3's, which says what is hard
        self.cache = None      # a folder that keeps the vectors of prompts
        self.device = device
        self.n_max = meta['max_frames'] // FRAMES_PER_TOKEN

    def condition(self, prompts, cache=None):
        """list of B str -> c (B, m, 512), c_valid (B, m)."""
        nodes = None
        if self.text == 'graph':
            nodes = [hgm3.graph(hgm3.tagged(prompt, self.tags)) for prompt in prompts]
        return condition(prompts, self.text_encoder, self.text, nodes, cache or self.cache,
                         self.device)

    @torch.no_grad()
    def lengths(self, c, c_valid, seed=0):
        """Plausible numbers of tokens (B,), drawn from the length estimator for c (B, m, 512),
        c_valid (B, m)."""
        if self.length is None:
            raise UserError('No length was given and there is no length estimator: give --length, '
                            'or train one with `python train_mask.py ... --stage=len`.')
        logits = self.length(c.to(self.device), c_valid.to(self.device))
        logits[:, 0] = -torch.inf
        logits[:, self.n_max + 1:] = -torch.inf
        return (logits + gumbel_like(logits, self.generator(seed))).argmax(-1)

    def generator(self, seed):
        return torch.Generator(self.device).manual_seed(seed)

    def generate(self, c, c_valid, n, seed=0, known=None, res_scale=5.0, res_temperature=1.0,
                 res_layers=-1, **decoding):
        """Text and numbers of tokens n (B,) -> ids (B, N, q): base tokens and res_layers residual
        layers, all there are by default. known (B, N, Q): tokens that are given and stay, -1 where
        one is wanted. decoding: see generate_base."""
        c, c_valid, n = c.to(self.device), c_valid.to(self.device), n.to(self.device)
        g = self.generator(seed)
        base = None if known is None else known[..., 0]
        ids = generate_base(self.mask, c, c_valid, n, base, generator=g, **decoding)
        if self.res is None:
            return ids.clamp(max=self.mask.MASK - 1)[..., None]
        available = self.res.config.n_quantizers - 1
        if res_layers > available:
            raise UserError(f'res_layers is {res_layers}, this model has {available}; -1 is all.')
        return generate_residual(self.res, ids, c, c_valid, n, known, res_layers, res_scale,
                                 temperature=res_temperature, generator=g)

    def encode(self, features):
        """The tokens (T // 4, Q) of un-normalized features (T, D)."""
        frames = len(features) // FRAMES_PER_TOKEN * FRAMES_PER_TOKEN
        features = torch.as_tensor(features[:frames], device=self.device)
        return self.vq.encode(self.vq.normalize(features)[None])[0]

    def decode(self, ids):
        """The un-normalized features (4 n, D) of one motion's tokens (n, q)."""
        return self.features(ids[None], torch.tensor([len(ids)]))[0]

    def edit(self, ids, spans, text, seed=0, **decoding):
        """MoMask 4.3: tokens (n, Q) of a motion, of which those in `spans`, pairs (first, end), are
        drawn anew to fit the text and what stands around them -> (n, Q). All others stay.

        A motion longer than the networks know is edited span by span, each in a window around it.
        """
        c, c_valid = self.condition([text])
        windows = [(0, len(ids), spans)]
        if len(ids) > self.n_max:
            windows = [(*self.window(len(ids), *span), [span]) for span in spans]
        ids = ids.clone()
        for first, end, inside in windows:
            known = ids[first:end].clone()
            for a, b in inside:
                known[a - first:b - first] = -1
            n = torch.tensor([end - first])
            made = self.generate(c, c_valid, n, seed, known[None], **decoding)[0]
            ids = ids[:, :made.shape[-1]]   # as many layers as are generated
            ids[first:end] = made
        return ids

    def window(self, n, first, end):
        """The n_max tokens of n around a span -> their first and end. UserError if it is longer."""
        around = self.n_max - (end - first)
        if around < 1:
            raise UserError(f'{FRAMES_PER_TOKEN * (end - first)} frames are to be filled in one '
                            f'piece, expected fewer than {FRAMES_PER_TOKEN * self.n_max}: this '
                            'model has seen no longer motion.')
        begin = min(max(0, first - around // 2), n - self.n_max)
        return begin, begin + self.n_max

    def join(self, parts, texts, seed=0, overlap=2, **decoding):
        """Motions as tokens [(n_i, Q)] with their texts -> one motion (sum n_i, Q) of any length.
        At each seam the last and the first `overlap` tokens are drawn anew, for the text 'this,
        then that'. No tensor of the networks grows with the length."""
        ids = torch.cat(parts)
        seam = 0
        for i in range(len(parts) - 1):
            seam += len(parts[i])
            before, after = min(overlap, len(parts[i]) - 1), min(overlap, len(parts[i + 1]) - 1)
            text = f'{texts[i]}, then {texts[i + 1]}'
            ids = self.edit(ids, [(seam - before, seam + after)], text, seed + i, **decoding)
        return ids

    def features(self, ids, n):
        """ids (B, N, q), n (B,) -> un-normalized features, a list of B arrays (4 n_i, D). Motions
        of one length are decoded together: none is touched by what stands behind its end."""
        out = [None] * len(ids)
        for rows in equal_lengths(n.cpu()):
            motion = self.vq.decode(ids[rows, :n[rows[0]]]).float()
            for i, features in zip(rows, self.vq.denormalize(motion).cpu().numpy()):
                out[i] = features
        return out


def load_pipeline(out_dir, device='cpu', mask_file='mask.pt'):
    """The Pipeline of what the training scripts wrote into out_dir. A transformer is used with the
    tokenizer that it was trained on, or not at all (UserError)."""
    config = f'config/{os.path.basename(os.path.normpath(out_dir))}.py'
    found = {}
    for kind, name in (('mask', mask_file), ('res', 'res.pt'), ('len', 'len.pt')):
        path = os.path.join(out_dir, name)
        if kind != 'mask' and not os.path.exists(path):
            continue
        stage = '' if kind == 'mask' else f' --stage={kind}'
        found[kind] = load(path, f'run `python train_mask.py {config}{stage}` first', kind,
                           ('config', 'model', 'settings', 'meta', 'vq', 'vq_hash', 'val'))
        found[kind]['path'] = path

    vq_path = found['mask']['vq']
    if not os.path.exists(vq_path):   # the folder was moved
        vq_path = os.path.join(out_dir, 'vq.pt')
    tokenizer = load_tokenizer(vq_path)
    networks = dict(mask=None, res=None, len=None)
    for kind, checkpoint in found.items():
        if checkpoint['vq_hash'] != tokenizer.fingerprint():
            raise UserError(
                f'{out_dir}: {kind}.pt was trained on tokenizer {checkpoint["vq_hash"]}, but '
                f'{vq_path} is {tokenizer.fingerprint()}: train the transformer again, or put its '
                'tokenizer back.')
        if kind == 'len':
            longest = checkpoint['meta']['max_frames'] // FRAMES_PER_TOKEN
            network = LengthEstimator(n_out=longest + 1)
        else:
            make = MaskTransformer if kind == 'mask' else ResTransformer
            network = make(config_from(ModelConfig, checkpoint['config'], checkpoint['path']))
        load_named(network, checkpoint['model'], checkpoint['path'])
        networks[kind] = network
    checkpoint = found['mask']
    settings = checkpoint['settings']
    pipe = Pipeline(tokenizer, networks['mask'], networks['res'], networks['len'],
                    settings['text_encoder'], checkpoint['meta'], device, settings['text'],
                    checkpoint.get('tags'))
    pipe.val = checkpoint['val']
    pipe.cache = os.path.join(out_dir, 'text')
    if checkpoint.get('teacher'):
        pipe.teacher = LossPredictor(pipe.mask.config).to(device).eval()
        load_named(pipe.teacher, checkpoint['teacher'], checkpoint['path'])
    return pipe
