"""Decoding: from text to tokens, and from a prompt to motion.

    generate_base       Algorithm 2: all base tokens masked, then filled in over a few steps
    generate_residual   MoMask 3.4: the residual layers, one after the other
    Pipeline            tokenizer + transformers + length estimator: prompts in, features out.
                        It edits a span of a motion and joins motions into one of any length
    open_pipeline       the Pipeline of our checkpoints or of the official ones

B prompts, N tokens of the longest, V codes. Text is c (B, m, 512) with role (B, m): see model.py.
"""
import math
import os

import numpy as np
import torch

import hgm3
import momask
import msd
from lib.bvh import fit_rotations
from lib.configurator import UserError
from lib.data import FRAMES_PER_TOKEN, equal_lengths
from lib.motion import SKELETONS, features_to_joints, lock_feet
from lib.runtime import config_from, load, load_weights, read_json
from lib.text import caption_vectors, tag_table, tagged, unseen_words
from lib.toy_language import LANGUAGE
from masking import gumbel_like, top_k
from model import LengthEstimator, LossPredictor, MaskTransformer, ModelConfig, ResTransformer
from vq import load_tokenizer

# ---------------------------------------------------------------------------- sampling and guidance


def sample(logits, top_share, temperature, generator):
    """Sample ids (B, n) from softmax(logits / temperature) over the largest `top_share` of the V
    logits (B, n, V). The arg-max of logits plus Gumbel noise is such a sample, and noise is drawn
    only for codes that can win: 52 of 512."""
    n_top = max(1, math.ceil(top_share * logits.shape[-1]))
    top, code = logits.topk(n_top, -1)
    winner = (top / temperature + gumbel_like(top, generator)).argmax(-1, keepdim=True)
    return code.gather(-1, winner)[..., 0]


def guided(model, scale, ids, c, role, valid, spectrum=None, **more):
    """Classifier-free guidance: logits uncond + s (cond - uncond), float32. This is MoMask Eq 5
    with s + 1 written as s, as in MoMask's code.

    Both halves are one batch. The unconditional half uses a zero vector as its only condition
    token. At scale 1 it would be multiplied by zero, so it is not computed.
    """
    if spectrum is not None:
        more['spectrum'] = spectrum
    if scale == 1:
        return model(ids, c, role, valid, **more).float()

    if spectrum is not None:
        more['spectrum'] = [twice(part) for part in spectrum]
    no_text = torch.zeros_like(role)
    no_text[:, 0] = 1
    c = torch.cat([c, torch.zeros_like(c)])
    logits = model(twice(ids), c, torch.cat([role, no_text]), twice(valid), **more)
    cond, uncond = logits.float().chunk(2)
    return uncond + scale * (cond - uncond)


def twice(x):
    return torch.cat([x, x])


# -------------------------------------------------------------------------------------- base tokens


def decoding_of(config):
    """The settings (a dict) that `Pipeline.generate` takes."""
    names = ('steps', 'cond_scale', 'res_scale', 'top_share', 'temperature', 'anneal',
             'res_temperature', 'res_layers', 'das_sampling', 'lambda_D', 'beta', 'sigma_max',
             'msd_decode')
    return {name: config[name] for name in names}


@torch.no_grad()
def generate_base(model, c, role, n, known=None, steps=10, cond_scale=4.0, top_share=0.1,
                  temperature=1.0, anneal=0.0, das_sampling=False, lambda_D=0.5, beta=0.5,
                  sigma_max=0.5, msd_decode='kept', generator=None, trace=None):
    """Algorithm 2. c (B, m, 512), role (B, m), n (B,) tokens wanted -> ids (B, N) with [PAD] behind
    the end of each row, where N is the largest n. known (B, N): tokens that are given and never
    masked, -1 where one is wanted. trace: a list to which each step appends its confidence in the
    tokens (B, N) that it fills in, NaN elsewhere. Other settings: config/decoding.py.

    Each step predicts all masked tokens, then masks the least confident ones again, fewer every
    time. Nothing in the loop waits for a GPU.
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
    shown = role

    for step in range(steps):
        masked_share = math.cos(math.pi / 2 * step / max(steps - 1, 1))  # gamma of MoMask 3.2
        n_masked = (masked_share * n_wanted).round().clamp(min=1).long()
        masked = top_k(-score, n_masked, wanted)
        ids = torch.where(masked, model.MASK, ids)

        spectrum = None
        if das_sampling or model.config.spectral_attn:
            spectrum = model.spectrum(guess if msd_decode == 'guess' else ids)
        if model.config.graph:                                           # HGM3 Eq 14
            shown = hgm3.visible_nodes(role, hgm3.decoding_level(step))

        prior = spectrum if model.config.spectral_attn else None
        logits = guided(model, cond_scale, ids, c, shown, valid, prior)
        log_p = logits.log_softmax(-1)                                   # (B, N, V)
        T = temperature
        if das_sampling:
            T = T * (1 - anneal * step / steps)                          # T_global of Eq 18
            f, seen = spectrum
            p_max = log_p.amax(-1).exp()
            omega = msd.complexity(f, model.config.omega)                # Eq 8
            b = msd.exploration(omega, seen & valid, p_max, masked, lambda_D)   # Eqs 15-17
            T = T * (1 + beta * b[..., None])                            # Eq 18 (repeated as Eq 20)
        sampled = sample(log_p, top_share, T, generator)
        ids = torch.where(masked, sampled, ids)

        confidence = log_p.gather(-1, sampled[..., None])[..., 0]
        if trace is not None:
            trace.append(torch.where(masked, confidence.exp(), torch.nan))
        if das_sampling:
            sigma = sigma_max * b                                        # Eq 19 (repeated as Eq 21)
            confidence = confidence + sigma * gumbel_like(confidence, generator)
        score = torch.where(masked, confidence, torch.inf)               # kept tokens stay kept
        guess = ids
    return ids


# ---------------------------------------------------------------------------------- residual tokens


@torch.no_grad()
def generate_residual(model, ids, c, role, n, known=None, n_layers=-1, cond_scale=5.0,
                      top_share=0.1, temperature=1.0, generator=None):
    """MoMask 3.4: base ids (B, N), n (B,) tokens each -> (B, N, 1 + n_layers), one guided pass per
    layer, 0 behind the end of each row. n_layers: how many residual layers to add, -1 is all.
    known (B, N, Q): tokens that are given, -1 where one is wanted."""
    V, Q = model.config.n_codes, model.config.n_quantizers
    valid = torch.arange(ids.shape[1], device=ids.device) < n[:, None]
    layers = ids[..., None].clamp(max=V).repeat(1, 1, Q)   # [PAD] is V + 1 there and V here
    n_layers = Q - 1 if n_layers < 0 else n_layers
    for q in range(1, 1 + n_layers):
        logits = guided(model, cond_scale, layers, c, role, valid, q=q)[..., :V]   # never [PAD]
        sampled = sample(logits, top_share, temperature, generator)
        if known is not None:
            sampled = torch.where(known[..., q] < 0, sampled, known[..., q])
        layers[..., q] = sampled
    return torch.where(valid[..., None], layers, 0)[..., :1 + n_layers]


# ----------------------------------------------------------------------------------------- pipeline


class Pipeline:
    """Everything between a prompt and motion features. Without a masked transformer it only
    reconstructs, without a residual transformer it generates base tokens only, and without a length
    estimator lengths must be given. meta: name, skeleton, fps, n_joints, dim, units_per_metre,
    max_frames of the data."""

    def __init__(self, tokenizer, mask, res, length, text_encoder, meta, device='cpu',
                 text='sentence', tags=None):
        networks = [net and net.to(device).eval() for net in (tokenizer, mask, res, length)]
        self.vq, self.mask, self.res, self.length = networks
        self.text_encoder = text_encoder
        self.text = text
        self.tags = tags       # see `read_tags`
        self.sentence_only = set()   # 'res', 'len': networks that read the sentence vector alone
        self.meta = meta
        self.val = None        # validation cross-entropy of the masked transformer
        self.teacher = None    # HGM3's, which predicts what is hard
        self.cache = None      # folder that keeps the CLIP vectors of prompts
        self.device = device
        self.n_max = meta['max_frames'] // FRAMES_PER_TOKEN

    def encode_text(self, prompts, cache=None):
        """list of B str -> c (B, m, 512), role (B, m)."""
        tokens = None
        if self.text == 'graph':
            tokens = [tagged(prompt, self.tags) for prompt in prompts]
        return caption_vectors(prompts, self.text_encoder, self.text, tokens, cache or self.cache,
                               self.device)

    def read_tags(self):
        """The part of speech of each word of the training captions, by stem: of the checkpoint if
        it was trained on graphs, otherwise of the data set, and none where that is missing."""
        path = os.path.join('data', self.meta['name'], 'train_captions.json')
        if self.tags is None and os.path.exists(path):
            captions = read_json(path, 'prepare the data set again')
            self.tags = tag_table(caption['tokens'] for caption in captions)
        return self.tags or {}

    def unseen(self, prompt):
        """A remark that names the words of a prompt that no training caption has, '' if there are
        none. CLIP knows most words by itself."""
        if self.text_encoder == 'clip':
            return ''
        remark = unseen_words(prompt, self.read_tags())
        if remark and self.meta['name'] == 'toy':
            remark += f'; the toy model knows {", ".join(LANGUAGE["phrases"])}'
        return remark

    @torch.no_grad()
    def lengths(self, c, role, seed=0):
        """Plausible numbers of tokens (B,), sampled from the length estimator for text c
        (B, m, 512), role (B, m)."""
        if self.length is None:
            raise UserError('No length was given and there is no length estimator: give --length, '
                            'or train one with `python train_mask.py ... --stage=len`.')
        if 'len' in self.sentence_only:
            c, role = c[:, :1], role[:, :1]
        logits = self.length(c.to(self.device), role.to(self.device))
        logits[:, 0] = -torch.inf
        logits[:, self.n_max + 1:] = -torch.inf
        return (logits + gumbel_like(logits, self.generator(seed))).argmax(-1)

    def generator(self, seed):
        return torch.Generator(self.device).manual_seed(seed)

    def generate(self, c, role, n, seed=0, known=None, res_scale=5.0, res_temperature=1.0,
                 res_layers=-1, **decoding):
        """Text and numbers of tokens n (B,) -> ids (B, N, q): base tokens and res_layers residual
        layers, by default all. known (B, N, Q): tokens that are given, -1 where one is wanted.
        decoding: see generate_base."""
        c, role, n = c.to(self.device), role.to(self.device), n.to(self.device)
        g = self.generator(seed)
        base = None if known is None else known[..., 0]
        ids = generate_base(self.mask, c, role, n, base, generator=g, **decoding)
        if self.res is None:
            return ids.clamp(max=self.mask.MASK - 1)[..., None]
        available = self.res.config.n_quantizers - 1
        if res_layers > available:
            raise UserError(f'res_layers is {res_layers}, but this model has {available} residual '
                            'layers; -1 takes all.')
        if 'res' in self.sentence_only:
            c, role = c[:, :1], role[:, :1]
        return generate_residual(self.res, ids, c, role, n, known, res_layers, res_scale,
                                 temperature=res_temperature, generator=g)

    def tokenize(self, features):
        """The tokens (T // 4, Q) of un-normalized features (T, D)."""
        frames = len(features) // FRAMES_PER_TOKEN * FRAMES_PER_TOKEN
        features = torch.as_tensor(features[:frames], device=self.device)
        return self.vq.encode(self.vq.normalize(features)[None])[0]

    def decode(self, ids):
        """The un-normalized features (4 n, D) of one motion's tokens (n, q)."""
        return self.features(ids[None], torch.tensor([len(ids)]))[0]

    def joints(self, ids, footlock=False):
        """The joints (4 n, J, 3) of one motion's tokens (n, q), in the data set's unit. footlock:
        with bones of constant length, and planted feet that do not slide."""
        joints = features_to_joints(self.decode(ids), self.meta['n_joints'])
        if footlock:
            skeleton = SKELETONS[self.meta['skeleton']]
            _, _, joints = fit_rotations(joints, skeleton)
            joints = lock_feet(joints, skeleton, self.meta['fps']).astype(np.float32)
        return joints

    def features(self, ids, n):
        """ids (B, N, q), n (B,) -> un-normalized features, a list of B arrays (4 n_i, D). Motions
        of the same length are decoded together, so that none is affected by padding."""
        out = [None] * len(ids)
        for rows in equal_lengths(n.cpu()):
            motion = self.vq.decode(ids[rows, :n[rows[0]]]).float()
            for i, features in zip(rows, self.vq.denormalize(motion).cpu().numpy()):
                out[i] = features
        return out

    # ------------------------------------------------------------------------ editing, long motion

    def edit(self, ids, spans, text, seed=0, **decoding):
        """MoMask 4.3: regenerate some tokens of a motion (n, Q), those in `spans`, pairs (first,
        end), to fit the text and the tokens around them -> (n, Q). All other tokens stay.

        A motion longer than the networks were trained on is edited span by span, each within a
        window around it.
        """
        c, role = self.encode_text([text])
        windows = [(0, len(ids), spans)]
        if len(ids) > self.n_max:
            windows = [(*self.window(len(ids), *span), [span]) for span in spans]

        ids = ids.clone()
        for first, end, inside in windows:
            known = ids[first:end].clone()
            for a, b in inside:
                known[a - first:b - first] = -1
            n = torch.tensor([end - first])
            generated = self.generate(c, role, n, seed, known[None], **decoding)[0]
            ids = ids[:, :generated.shape[-1]]   # as many layers as were generated
            ids[first:end] = generated
        return ids

    def window(self, n, first, end):
        """The n_max of n tokens around a span (first, end) -> their first and end. UserError where
        the span is longer than that."""
        around = self.n_max - (end - first)
        if around < 1:
            raise UserError(f'{FRAMES_PER_TOKEN * (end - first)} frames are to be filled in one '
                            f'piece, expected fewer than {FRAMES_PER_TOKEN * self.n_max}, the '
                            'longest motion that this model was trained on.')
        begin = min(max(0, first - around // 2), n - self.n_max)
        return begin, begin + self.n_max

    def join(self, parts, texts, seed=0, overlap=2, **decoding):
        """Motions as tokens [(n_i, Q)] with their texts -> one motion (sum n_i, Q) of any length.
        At each seam the last and the first `overlap` tokens are regenerated for the text 'this,
        then that'. Memory does not grow with the length."""
        ids = torch.cat(parts)
        seam = 0
        for i in range(len(parts) - 1):
            seam += len(parts[i])
            before, after = min(overlap, len(parts[i]) - 1), min(overlap, len(parts[i + 1]) - 1)
            text = f'{texts[i]}, then {texts[i + 1]}'
            ids = self.edit(ids, [(seam - before, seam + after)], text, seed + i, **decoding)
        return ids


# ------------------------------------------------------------------------------------------ loading


def open_pipeline(config, data, out_dir, device):
    """The Pipeline that a script's settings (config/decoding.py) ask for: the official weights, or
    what training wrote into out_dir."""
    if config['init_from'] == 'checkpoint':
        return load_pipeline(out_dir, device, config['mask_file'])
    return official_pipeline(config['momask_root'], 'kit' if data == 'kit' else 't2m',
                             config['text_encoder'], config['momask_mask'], config['momask_res'],
                             device)


def official_pipeline(root, dataset='t2m', text_encoder='clip', mask_name='', res_name='',
                      device='cpu'):
    """MoMask's official weights as a Pipeline. dataset is 't2m' (HumanML3D) or 'kit'; the names of
    the two transformers may be '' where there is only one. UserError where they were trained on
    different tokenizers (opt.txt)."""
    mask_name = mask_name or momask.only_folder(root, dataset, 't2m_')
    res_name = res_name or momask.only_folder(root, dataset, 'tres_')
    vq_names = {momask.read_opt(root, dataset, name)['vq_name'] for name in (mask_name, res_name)}
    if len(vq_names) != 1:
        raise UserError(f'{mask_name} and {res_name} were trained on different tokenizers '
                        f'({", ".join(sorted(vq_names))}): name a pair that belongs together.')
    key = 'kit21' if dataset == 'kit' else 'smpl22'
    skeleton = SKELETONS[key]
    meta = dict(name=dataset, skeleton=key, fps=skeleton.fps, n_joints=skeleton.n_joints,
                dim=skeleton.dim, units_per_metre=skeleton.units_per_metre, max_frames=196)
    return Pipeline(
        momask.tokenizer(root, dataset, vq_names.pop()),
        momask.mask_transformer(root, dataset, mask_name),
        momask.res_transformer(root, dataset, res_name),
        momask.length_estimator(root, dataset), text_encoder, meta, device)


def load_pipeline(out_dir, device='cpu', mask_file='mask.pt'):
    """The Pipeline of what the training scripts wrote into out_dir. UserError where the networks do
    not share a tokenizer or a text mode."""
    found = {}
    for kind, name in (('mask', mask_file), ('res', 'res.pt'), ('len', 'len.pt')):
        path = os.path.join(out_dir, name)
        if kind == 'mask' or os.path.exists(path):
            stage = '' if kind == 'mask' else f' --stage={kind}'
            hint = f'run `python train_mask.py{stage}` with this config first'
            found[kind] = load(path, hint, kind,
                               ('config', 'model', 'settings', 'meta', 'vq', 'vq_hash', 'val'))

    # a copied folder has its own vq.pt; a run with --vq=... has the tokenizer elsewhere
    mask = found['mask']
    settings = mask['settings']
    for vq_path in (os.path.join(out_dir, 'vq.pt'), mask['vq']):
        if os.path.exists(vq_path) or vq_path == mask['vq']:
            tokenizer = load_tokenizer(vq_path)
            if tokenizer.fingerprint() == mask['vq_hash']:
                break

    networks = dict(mask=None, res=None, len=None)
    for kind, checkpoint in found.items():
        name = mask_file if kind == 'mask' else f'{kind}.pt'
        own = checkpoint['settings']
        same_encoder = own['text_encoder'] == settings['text_encoder']
        if not same_encoder or own['text'] not in (settings['text'], 'sentence'):
            raise UserError(
                f'{out_dir}: {name} was trained with --text_encoder={own["text_encoder"]} '
                f'--text={own["text"]}, but {mask_file} with {settings["text_encoder"]} and '
                f'{settings["text"]}: train one of them again.')
        if checkpoint['vq_hash'] != tokenizer.fingerprint():
            raise UserError(
                f'{out_dir}: {name} was trained on tokenizer {checkpoint["vq_hash"]}, but '
                f'{vq_path} is {tokenizer.fingerprint()}: train the transformer again, or put its '
                'tokenizer back.')
        path = os.path.join(out_dir, name)
        if kind == 'len':
            longest = checkpoint['meta']['max_frames'] // FRAMES_PER_TOKEN
            network = LengthEstimator(n_out=longest + 1)
        else:
            make = MaskTransformer if kind == 'mask' else ResTransformer
            network = make(config_from(ModelConfig, checkpoint['config'], path))
        load_weights(network, checkpoint['model'], path)
        networks[kind] = network

    pipe = Pipeline(tokenizer, networks['mask'], networks['res'], networks['len'],
                    settings['text_encoder'], mask['meta'], device, settings['text'],
                    mask.get('tags'))
    pipe.sentence_only = {kind for kind in found if found[kind]['settings']['text'] == 'sentence'}
    pipe.val = mask['val']
    pipe.cache = os.path.join(out_dir, 'text')
    if mask.get('teacher'):
        pipe.teacher = LossPredictor(pipe.mask.config).to(device).eval()
        load_weights(pipe.teacher, mask['teacher'], os.path.join(out_dir, mask_file))
    return pipe
