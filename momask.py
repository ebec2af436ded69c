"""The official weights of MoMask and of Guo et al.'s evaluator, as our networks.

    pipe = momask.pipeline('checkpoints', 't2m')      # tokenizer, both transformers, lengths
    judge = momask.evaluator('checkpoints', 't2m')

root holds the release as it is unpacked. A name '' is the only folder of its kind. Every size is
read off the tensors or opt.txt, nothing in a checkpoint is executed, and whatever does not fit is a
UserError that names the file.
"""
import os
import re
from pathlib import Path

import numpy as np

import msd
from lib.configurator import UserError
from lib.evaluator import Evaluator, Words
from generate import Pipeline, load_pipeline
from model import LengthEstimator, MaskTransformer, ModelConfig, ResTransformer
from lib.motion import SKELETONS
from lib.runtime import load, load_named, read_array, read_text
from vq import RVQVAE, VQConfig

# {official: ours} in the tensors' names
TOKENIZER = {'quantizer.layers': 'quantizers', 'model.': ''}
TRANSFORMER = {
    'input_process.poseEmbedding': 'trunk.embed',
    'cond_emb': 'trunk.cond',
    'seqTransEncoder.': 'trunk.',
    'self_attn.in_proj_': 'attn.in_proj.',
    'self_attn': 'attn',
    'output_process.LayerNorm': 'head.norm',
    'output_process.poseFinal': 'head.out',
    'output_process': 'head',
    # of the residual transformer alone
    'quant_emb': 'layer_emb',
    'token_embed_weight_': 'first',
    'embed_proj_shared_weight': 'shared',
    'output_proj_weight_': 'last',
}
LAYOUT = ('expected <root>/<t2m|kit>/<name>/{opt.txt, meta, model} of the official release; check '
          'the root and the name')
NOT_OURS = r'position_enc\.pe|clip_model\..*'   # recomputed; open_clip's (text.py)


class Checkpoint:
    """<root>/<dataset>/<name>/model/<file>: the state dict under the first of `keys` there."""

    def __init__(self, root, dataset, name, file, *keys):
        self.path = os.path.join(root, dataset, name, 'model', file)
        entries = load(self.path, LAYOUT)
        found = [key for key in keys if isinstance(entries.get(key), dict)]
        if not found:
            raise UserError(f'{self.path} has the entries {sorted(map(str, entries))}, expected '
                            f'{" or ".join(keys)}: is it another model?')
        self.weights = entries[found[0]]

    def shape(self, name):
        """Of a tensor that must be there."""
        if not hasattr(self.weights.get(name), 'shape'):
            raise UserError(f'{self.path} has no tensor {name}: is it of another model?')
        return self.weights[name].shape

    def count(self, pattern):
        """How many different numbers stand at the pattern's group in the tensors' names."""
        found = (re.match(pattern, name) for name in self.weights)
        return len({match[1] for match in found if match})

    def fill(self, model, names, missing_ok=''):
        """The model with these weights; names: {official: ours}, from top to bottom."""
        weights = {}
        for name, tensor in self.weights.items():
            if not re.fullmatch(NOT_OURS, name):
                for official, ours in names.items():
                    name = name.replace(official, ours)
                weights[name] = tensor
        load_named(model, weights, self.path, missing_ok)
        return model.eval()


def tokenizer(root, dataset, name):
    """<root>/<dataset>/<name>/{model/net_best_fid.tar, meta/mean.npy, meta/std.npy} -> RVQVAE."""
    official = Checkpoint(root, dataset, name, 'net_best_fid.tar', 'vq_model', 'net')
    width, dim, _ = official.shape('encoder.model.0.weight')
    n_codes, code_dim = official.shape('quantizer.layers.0.codebook')
    config = VQConfig(
        dim=dim, n_codes=n_codes, code_dim=code_dim, width=width,
        n_quantizers=official.count(r'quantizer\.layers\.(\d+)\.'),
        down=official.count(r'encoder\.model\.(\d+)\.0\.weight'),
        depth=official.count(r'encoder\.model\.2\.1\.model\.(\d+)\.'))
    mean, std = statistics(os.path.join(root, dataset, name, 'meta'), dim)
    not_released = r'mean|std|.*code_(sum|count)'
    return official.fill(RVQVAE(config, mean, std), TOKENIZER, not_released)


def mask_transformer(root, dataset, name=''):
    """<root>/<dataset>/<t2m_...>/model/latest.tar -> MaskTransformer. Its MSD sees motion through
    the codes of the tokenizer that opt.txt names."""
    name = name or only_folder(root, dataset, 't2m_')
    official = Checkpoint(root, dataset, name, 'latest.tar', 't2m_transformer', 'trans')
    opt = read_opt(root, dataset, name)
    rows, code_dim = official.shape('token_emb.weight')
    config = transformer_config(official, opt, n_codes=rows - 2, code_dim=code_dim)
    model = official.fill(MaskTransformer(config), TRANSFORMER, 'G')
    codes = tokenizer(root, dataset, opt['vq_name']).quantizers[0].codebook
    model.G.copy_(msd.gram(codes))
    return model


def res_transformer(root, dataset, name=''):
    """<root>/<dataset>/<tres_...>/model/net_best_fid.tar -> ResTransformer."""
    name = name or only_folder(root, dataset, 'tres_')
    official = Checkpoint(root, dataset, name, 'net_best_fid.tar', 'res_transformer', 'trans')
    opt = read_opt(root, dataset, name)
    shared, rows, code_dim = official.shape('embed_proj_shared_weight')
    config = transformer_config(official, opt, n_codes=rows - 1, code_dim=code_dim,
                                n_quantizers=shared + 2)
    return official.fill(ResTransformer(config), TRANSFORMER)


def transformer_config(official, opt, **known):
    """Sizes from the tensors, heads from opt.txt. MoMask has no spectral attention."""
    latent, _ = official.shape('input_process.poseEmbedding.weight')
    ff, _ = official.shape('seqTransEncoder.layers.0.linear1.weight')
    _, text_dim = official.shape('cond_emb.weight')
    n_layers = official.count(r'seqTransEncoder\.layers\.(\d+)\.')
    n_heads = int(opt['n_heads'])
    if latent % n_heads:
        raise UserError(f'{official.path}: {n_heads} heads do not divide its width {latent}: '
                        'opt.txt is of another model.')
    return ModelConfig(latent=latent, ff=ff, text_dim=text_dim, n_heads=n_heads, n_layers=n_layers,
                       spectral_attn=False, **known)


def length_estimator(root, dataset, name='length_estimator'):
    """<root>/<dataset>/<name>/model/finest.tar -> LengthEstimator."""
    official = Checkpoint(root, dataset, name, 'finest.tar', 'estimator')
    _, text_dim = official.shape('output.0.weight')
    n_out, _ = official.shape('output.11.weight')
    return official.fill(LengthEstimator(text_dim, n_out), {})


def evaluator(root, dataset, glove_dir=None):
    """<root>/<dataset>/text_mot_match/model/finest.tar, <root>/<dataset>/Comp_v6_KLD005/meta ->
    Evaluator. glove_dir (else <root>/glove, where that exists) holds the word vectors that its text
    encoder reads; without them it embeds motion only."""
    movements, motion, text = (
        Checkpoint(root, dataset, 'text_mot_match', 'finest.tar', part)
        for part in ('movement_encoder', 'motion_encoder', 'text_encoder'))
    movement, features, _ = movements.shape('main.0.weight')
    code, _, _ = movements.shape('main.3.weight')
    _, _, motion_hidden = motion.shape('hidden')
    _, _, text_hidden = text.shape('hidden')
    word_dim, tag_dim = text.shape('pos_emb.weight')
    out, _ = text.shape('output_net.3.weight')
    dim = features + 4   # it reads all but the four contacts
    mean, std = statistics(os.path.join(root, dataset, 'Comp_v6_KLD005', 'meta'), dim)
    glove = os.path.join(root, 'glove')
    if glove_dir is None and os.path.isdir(glove):
        glove_dir = glove
    words = Words(glove_dir) if glove_dir else None
    model = Evaluator(mean, std, words, movement, code, motion_hidden, text_hidden, out, word_dim,
                      tag_dim)
    movements.fill(model.movement_encoder, {})
    motion.fill(model.motion_encoder, {})
    text.fill(model.text_encoder, {})
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


def open_pipeline(config, out_dir, device):
    """The Pipeline that a script's settings (config/decoding.py) ask for: the official release, or
    what training wrote into out_dir."""
    if config['init_from'] == 'checkpoint':
        return load_pipeline(out_dir, device, config['mask_file'])
    return pipeline(config['momask_root'], config['momask_data'], config['momask_text'],
                    config['momask_mask'], config['momask_res'], device)


def read_opt(root, dataset, name):
    """opt.txt of an official checkpoint, lines of 'key: value' -> dict of str."""
    path = os.path.join(root, dataset, name, 'opt.txt')
    text = read_text(path, LAYOUT)
    opt = dict(line.strip().split(': ', 1) for line in text.splitlines() if ': ' in line.strip())
    for key, form in (('n_heads', r'[1-9][0-9]{0,3}'), ('vq_name', r'[^\0/]+')):
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
    folder = Path(root, dataset)
    found = sorted(path.name for path in folder.glob(f'{prefix}*'))
    if len(found) != 1:
        raise UserError(f'{folder} has {len(found)} folders that start with {prefix} '
                        f'({", ".join(found) or "none"}), expected one: name it.')
    return found[0]
