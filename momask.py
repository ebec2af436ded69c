"""The official weights of MoMask and of Guo et al.'s evaluator, as our networks.

    pipe = momask.pipeline('checkpoints', 't2m')      # tokenizer, both transformers, lengths
    judge = momask.evaluator('checkpoints', 't2m')

root holds the release as it is unpacked: <root>/<t2m|kit>/<name>/{opt.txt, meta, model}. name '' is
the only folder of its kind. Every size is read off the tensors or opt.txt, nothing in a checkpoint
is executed, and whatever does not fit is a UserError that names the file. The networks themselves
know nothing of this file: here stands how the release names their tensors.
"""
import os
import re

import numpy as np

import msd
from configurator import UserError
from evaluator import Evaluator, Words
from generate import Pipeline
from model import LengthEstimator, MaskTransformer, ModelConfig, ResTransformer
from motion import SKELETONS
from runtime import load, load_named, read_array, read_text
from vq import RVQVAE, VQConfig

# (official, ours), applied to each tensor's name from top to bottom
TOKENIZER = [
    ('quantizer.layers', 'quantizers'),
    ('model.', ''),
]
TRANSFORMER = [
    ('input_process.poseEmbedding', 'trunk.embed'),
    ('cond_emb', 'trunk.cond'),
    ('seqTransEncoder.', 'trunk.'),
    ('self_attn.in_proj_', 'attn.in_proj.'),
    ('self_attn', 'attn'),
    ('output_process.LayerNorm', 'head.norm'),
    ('output_process.poseFinal', 'head.out'),
    ('output_process', 'head'),
]
RESIDUAL = TRANSFORMER + [
    ('quant_emb', 'layer_emb'),
    ('token_embed_weight_', 'first'),
    ('embed_proj_shared_weight', 'shared'),
    ('output_proj_weight_', 'last'),
]
NOT_OURS = r'position_enc\.pe|clip_model\..*'   # recomputed; open_clip's (text.py)


def tokenizer(root, dataset, name):
    """<root>/<dataset>/<name>/{model/net_best_fid.tar, meta/mean.npy, meta/std.npy} -> RVQVAE."""
    path = os.path.join(root, dataset, name, 'model', 'net_best_fid.tar')
    weights = read(path, 'vq_model', 'net')
    width, dim, _ = shape(weights, 'encoder.model.0.weight', path)
    n_codes, code_dim = shape(weights, 'quantizer.layers.0.codebook', path)
    config = VQConfig(
        dim=dim, n_codes=n_codes, code_dim=code_dim, width=width,
        n_quantizers=count(weights, r'quantizer\.layers\.(\d+)\.'),
        down=count(weights, r'encoder\.model\.(\d+)\.0\.weight'),
        depth=count(weights, r'encoder\.model\.2\.1\.model\.(\d+)\.'))
    mean, std = statistics(os.path.join(root, dataset, name, 'meta'), dim)
    model = RVQVAE(config, mean, std)
    running_sums = r'mean|std|.*code_(sum|count)'
    load_named(model, rename(weights, TOKENIZER), path, missing_ok=running_sums)
    return model.eval()


def mask_transformer(root, dataset, name=''):
    """<root>/<dataset>/<t2m_...>/model/latest.tar -> MaskTransformer, without spectral attention.
    MSD sees motion through the codes of the tokenizer that opt.txt names."""
    name = name or only_folder(root, dataset, 't2m_')
    path = os.path.join(root, dataset, name, 'model', 'latest.tar')
    weights = read(path, 't2m_transformer', 'trans')
    rows, code_dim = shape(weights, 'token_emb.weight', path)
    opt = read_opt(root, dataset, name)
    config = transformer_config(weights, path, opt, n_codes=rows - 2, code_dim=code_dim)
    model = MaskTransformer(config)
    load_named(model, rename(weights, TRANSFORMER), path, missing_ok='G')
    codes = tokenizer(root, dataset, opt['vq_name']).quantizers[0].codebook
    model.G.copy_(msd.gram(codes))
    return model.eval()


def res_transformer(root, dataset, name=''):
    """<root>/<dataset>/<tres_...>/model/net_best_fid.tar -> ResTransformer."""
    name = name or only_folder(root, dataset, 'tres_')
    path = os.path.join(root, dataset, name, 'model', 'net_best_fid.tar')
    weights = read(path, 'res_transformer', 'trans')
    shared, rows, code_dim = shape(weights, 'embed_proj_shared_weight', path)
    opt = read_opt(root, dataset, name)
    config = transformer_config(weights, path, opt, n_codes=rows - 1, code_dim=code_dim,
                                n_quantizers=shared + 2)
    model = ResTransformer(config)
    load_named(model, rename(weights, RESIDUAL), path)
    return model.eval()


def length_estimator(root, dataset, name='length_estimator'):
    """<root>/<dataset>/<name>/model/finest.tar -> LengthEstimator."""
    path = os.path.join(root, dataset, name, 'model', 'finest.tar')
    weights = read(path, 'estimator')
    _, text_dim = shape(weights, 'output.0.weight', path)
    n_out, _ = shape(weights, 'output.11.weight', path)
    model = LengthEstimator(text_dim, n_out)
    load_named(model, weights, path)
    return model.eval()


def evaluator(root, dataset, name='text_mot_match', glove_dir=None):
    """<root>/<dataset>/<name>/model/finest.tar, <root>/<dataset>/Comp_v6_KLD005/meta -> Evaluator.
    glove_dir (else <root>/glove, where that exists) holds the word vectors that its text encoder
    reads; without them it embeds motion only."""
    path = os.path.join(root, dataset, name, 'model', 'finest.tar')
    parts = {key: read(path, key)
             for key in ('movement_encoder', 'motion_encoder', 'text_encoder')}
    movement, features, _ = shape(parts['movement_encoder'], 'main.0.weight', path)
    word_dim, tag_dim = shape(parts['text_encoder'], 'pos_emb.weight', path)
    sizes = dict(
        movement=movement, word_dim=word_dim, tag_dim=tag_dim,
        code=shape(parts['movement_encoder'], 'main.3.weight', path)[0],
        motion_hidden=shape(parts['motion_encoder'], 'hidden', path)[-1],
        text_hidden=shape(parts['text_encoder'], 'hidden', path)[-1],
        out=shape(parts['text_encoder'], 'output_net.3.weight', path)[0])
    mean, std = statistics(os.path.join(root, dataset, 'Comp_v6_KLD005', 'meta'), features + 4)
    if glove_dir is None and os.path.isdir(os.path.join(root, 'glove')):
        glove_dir = os.path.join(root, 'glove')
    model = Evaluator(mean, std, Words(glove_dir) if glove_dir else None, **sizes)
    for key, weights in parts.items():
        load_named(getattr(model, key), weights, f'{path} ({key})')
    return model.eval()


def pipeline(root, dataset='t2m', text_encoder='clip', mask_name='', res_name='', device='cpu'):
    """The whole release as a Pipeline. Both transformers must be of one tokenizer (opt.txt)."""
    mask_name = mask_name or only_folder(root, dataset, 't2m_')
    res_name = res_name or only_folder(root, dataset, 'tres_')
    vq_names = {read_opt(root, dataset, name)['vq_name'] for name in (mask_name, res_name)}
    if len(vq_names) != 1:
        raise UserError(f'{mask_name} and {res_name} were trained on different tokenizers '
                        f'({", ".join(sorted(vq_names))}): name a pair that fits.')
    key = 'kit21' if dataset == 'kit' else 'smpl22'
    skeleton = SKELETONS[key]
    meta = dict(name=dataset, skeleton=key, fps=skeleton.fps, n_joints=skeleton.n_joints,
                dim=skeleton.dim, units_per_metre=skeleton.units_per_metre, max_frames=196)
    return Pipeline(
        tokenizer(root, dataset, vq_names.pop()), mask_transformer(root, dataset, mask_name),
        res_transformer(root, dataset, res_name), length_estimator(root, dataset),
        text_encoder, meta, device)


# -------------------------------------------------------------------------- reading what is there


def read(path, *keys):
    """The state dict under the first of `keys` in an official checkpoint."""
    hint = ('expected the layout <root>/<t2m|kit>/<name>/model/ of the official release; check the '
            'root and the name')
    checkpoint = load(path, hint)
    for key in keys:
        if isinstance(checkpoint.get(key), dict):
            return checkpoint[key]
    raise UserError(f'{path} has the entries {sorted(map(str, checkpoint))}, expected '
                    f'{" or ".join(keys)}: is it another model?')


def rename(weights, table):
    """Official tensor names -> ours."""
    out = {}
    for name, tensor in weights.items():
        if re.fullmatch(NOT_OURS, name):
            continue
        for official, ours in table:
            name = name.replace(official, ours)
        out[name] = tensor
    return out


def shape(weights, name, path):
    """The shape of a tensor that must be there."""
    if not hasattr(weights.get(name), 'shape'):
        raise UserError(f'{path} has no tensor {name}: is it the checkpoint of another model?')
    return weights[name].shape


def count(weights, pattern):
    """How many different numbers stand at the pattern's group in the tensors' names."""
    found = (re.match(pattern, name) for name in weights)
    return len({match[1] for match in found if match})


def transformer_config(weights, path, opt, **known):
    """Sizes from the tensors, heads from opt.txt. An official model is MoMask: no spectral
    attention."""
    latent, _ = shape(weights, 'input_process.poseEmbedding.weight', path)
    ff, _ = shape(weights, 'seqTransEncoder.layers.0.linear1.weight', path)
    _, text_dim = shape(weights, 'cond_emb.weight', path)
    n_heads = int(opt['n_heads'])
    if n_heads < 1 or latent % n_heads:
        raise UserError(f'{path}: {n_heads} heads do not divide its width {latent}: opt.txt is of '
                        'another model.')
    n_layers = count(weights, r'seqTransEncoder\.layers\.(\d+)\.')
    return ModelConfig(latent=latent, ff=ff, text_dim=text_dim, n_heads=n_heads, n_layers=n_layers,
                       spectral_attn=False, **known)


def read_opt(root, dataset, name):
    """opt.txt of an official checkpoint, lines of 'key: value' -> dict of str."""
    path = os.path.join(root, dataset, name, 'opt.txt')
    text = read_text(path, 'expected <root>/<t2m|kit>/<name>/opt.txt of the official release; '
                           'check the root and the name')
    opt = dict(line.strip().split(': ', 1) for line in text.splitlines() if ': ' in line.strip())
    for key, form in (('n_heads', r'[0-9]{1,4}'), ('vq_name', r'[^\0/]+')):
        if not re.fullmatch(form, opt.get(key, '')):
            raise UserError(f'{path} has no line "{key}: ..." that makes sense: it is damaged, or '
                            'of another model.')
    return opt


def statistics(folder, dim):
    """mean.npy and std.npy (dim,) of a folder."""
    arrays = []
    for name in ('mean.npy', 'std.npy'):
        path = os.path.join(folder, name)
        array = np.array(read_array(path, 'the release keeps mean.npy and std.npy there; get it '
                                          'again'))
        if array.shape != (dim,):
            raise UserError(f'{path} is {array.shape}, expected ({dim},) as the weights: it '
                            'belongs to another data set.')
        arrays.append(array)
    return arrays


def only_folder(root, dataset, prefix):
    """The only folder under <root>/<dataset> whose name starts with prefix."""
    folder = os.path.join(root, dataset)
    found = []
    if os.path.isdir(folder):
        found = sorted(name for name in os.listdir(folder) if name.startswith(prefix))
    if len(found) != 1:
        raise UserError(f'{folder} has {len(found)} folders that start with {prefix} '
                        f'({", ".join(found) or "none"}), expected one: name it.')
    return found[0]
