"""Load the official weights of MoMask, and of Guo et al.'s evaluator, into our networks.

    momask.tokenizer('checkpoints', 't2m', 'rvq_...')     -> RVQVAE
    momask.mask_transformer('checkpoints', 't2m')         -> MaskTransformer
    momask.evaluator('checkpoints', 't2m')                -> Evaluator

root is the folder that MoMask's download is unpacked to, dataset is 't2m' (HumanML3D) or 'kit'. A
name '' means the only folder of its kind. Sizes come from the tensors' shapes and opt.txt, and a
file that does not fit is a UserError. generate.official_pipeline puts the networks together.
"""
import os
import re
from pathlib import Path

import numpy as np

import msd
from lib.configurator import UserError
from lib.evaluator import Evaluator, Words
from lib.runtime import load, load_weights, read_array, read_text
from model import LengthEstimator, MaskTransformer, ModelConfig, ResTransformer
from vq import RVQVAE, VQConfig

# {official: ours}, parts of the names of tensors
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
    # residual transformer only
    'quant_emb': 'layer_emb',
    'token_embed_weight_': 'first',
    'embed_proj_shared_weight': 'shared',
    'output_proj_weight_': 'last',
}
NOT_OURS = r'position_enc\.pe|clip_model\..*'   # positions are recomputed, CLIP is open_clip's
LAYOUT = ('expected <root>/<t2m|kit>/<name>/{opt.txt, meta, model} as in the official download; '
          'check the root and the name')


class Checkpoint:
    """<root>/<dataset>/<name>/model/<file>: the state dict under the first of `keys` in it."""

    def __init__(self, root, dataset, name, file, *keys):
        self.path = os.path.join(root, dataset, name, 'model', file)
        entries = load(self.path, LAYOUT)
        found = [entries[key] for key in keys if isinstance(entries.get(key), dict)]
        if not found:
            raise UserError(f'{self.path} has no {" or ".join(keys)}: is it another model?')
        self.weights = found[0]

    def shape(self, name):
        """The shape of a tensor that must be in the file."""
        if not hasattr(self.weights.get(name), 'shape'):
            raise UserError(f'{self.path} has no tensor {name}: is it another model?')
        return self.weights[name].shape

    def count(self, pattern):
        """How many different values the pattern's group has among the names of the tensors."""
        return len(set(re.findall(pattern, '\n'.join(self.weights), re.MULTILINE)))

    def fill(self, model, names, missing_ok=''):
        """Load these weights into the model; names {official: ours} are replaced in order."""
        weights = {}
        for name, tensor in self.weights.items():
            if not re.fullmatch(NOT_OURS, name):
                for official, ours in names.items():
                    name = name.replace(official, ours)
                weights[name] = tensor
        load_weights(model, weights, self.path, missing_ok)
        return model.eval()


def tokenizer(root, dataset, name):
    """<root>/<dataset>/<name>/{model/net_best_fid.tar, meta/mean.npy, meta/std.npy} -> RVQVAE."""
    official = Checkpoint(root, dataset, name, 'net_best_fid.tar', 'vq_model', 'net')
    width, dim, _ = official.shape('encoder.model.0.weight')
    n_codes, code_dim = official.shape('quantizer.layers.0.codebook')
    config = VQConfig(
        dim=dim, n_codes=n_codes, code_dim=code_dim, width=width,
        n_quantizers=official.count(r'^quantizer\.layers\.(\d+)\.'),
        down=official.count(r'^encoder\.model\.(\d+)\.0\.weight'),
        depth=official.count(r'^encoder\.model\.2\.1\.model\.(\d+)\.'))
    mean, std = statistics(os.path.join(root, dataset, name, 'meta'), dim)
    return official.fill(RVQVAE(config, mean, std), TOKENIZER, r'mean|std|.*code_(sum|count)')


def mask_transformer(root, dataset, name=''):
    """<root>/<dataset>/<t2m_...>/model/latest.tar -> MaskTransformer. Its MSD describes motion
    through the codes of the tokenizer that opt.txt names."""
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
    """ModelConfig: sizes from the tensors, the number of heads from opt.txt."""
    latent, _ = official.shape('input_process.poseEmbedding.weight')
    ff, _ = official.shape('seqTransEncoder.layers.0.linear1.weight')
    _, text_dim = official.shape('cond_emb.weight')
    n_layers = official.count(r'^seqTransEncoder\.layers\.(\d+)\.')
    n_heads = int(opt['n_heads'])
    if latent % n_heads:
        raise UserError(f'{official.path} has width {latent}, which {n_heads} heads do not divide: '
                        'opt.txt belongs to another model.')
    return ModelConfig(latent=latent, ff=ff, text_dim=text_dim, n_heads=n_heads, n_layers=n_layers,
                       **known)


def length_estimator(root, dataset, name='length_estimator'):
    """<root>/<dataset>/<name>/model/finest.tar -> LengthEstimator."""
    official = Checkpoint(root, dataset, name, 'finest.tar', 'estimator')
    _, text_dim = official.shape('output.0.weight')
    n_out, _ = official.shape('output.11.weight')
    return official.fill(LengthEstimator(text_dim, n_out), {})


def evaluator(root, dataset, glove_dir=None):
    """<root>/<dataset>/text_mot_match/model/finest.tar and <root>/<dataset>/Comp_v6_KLD005/meta ->
    Evaluator. glove_dir, by default <root>/glove if it exists, holds the word vectors that its text
    encoder reads. Without them it can only embed motion."""
    movements, motion, text = (
        Checkpoint(root, dataset, 'text_mot_match', 'finest.tar', part)
        for part in ('movement_encoder', 'motion_encoder', 'text_encoder'))
    movement, features, _ = movements.shape('main.0.weight')
    code, _, _ = movements.shape('main.3.weight')
    _, _, motion_hidden = motion.shape('hidden')
    _, _, text_hidden = text.shape('hidden')
    word_dim, tag_dim = text.shape('pos_emb.weight')
    out, _ = text.shape('output_net.3.weight')
    dim = features + 4   # it reads all features but the four foot contacts
    mean, std = statistics(os.path.join(root, dataset, 'Comp_v6_KLD005', 'meta'), dim)

    if glove_dir is None and os.path.isdir(os.path.join(root, 'glove')):
        glove_dir = os.path.join(root, 'glove')
    words = Words(glove_dir) if glove_dir else None
    model = Evaluator(mean, std, words, movement, code, motion_hidden, text_hidden, out, word_dim,
                      tag_dim)
    movements.fill(model.movement_encoder, {})
    motion.fill(model.motion_encoder, {})
    text.fill(model.text_encoder, {})
    return model.eval()


def read_opt(root, dataset, name):
    """opt.txt of an official checkpoint, lines of 'key: value' -> dict of str."""
    path = os.path.join(root, dataset, name, 'opt.txt')
    text = read_text(path, LAYOUT)
    opt = dict(line.strip().split(': ', 1) for line in text.splitlines() if ': ' in line.strip())
    for key, form in (('n_heads', r'[1-9][0-9]{0,3}'), ('vq_name', r'[^\0/]*[^\0/.][^\0/]*')):
        if not re.fullmatch(form, opt.get(key, '')):
            raise UserError(f'{path} has no usable line "{key}: ...": it is damaged, or belongs to '
                            'another model.')
    return opt


def statistics(folder, dim):
    """mean.npy and std.npy (dim,) of a folder."""
    paths = [os.path.join(folder, name) for name in ('mean.npy', 'std.npy')]
    arrays = [np.array(read_array(path, 'the official download has it; get it again'))
              for path in paths]
    for path, array in zip(paths, arrays):
        if array.shape != (dim,):
            raise UserError(f'{path} is {array.shape}, expected ({dim},) as in the weights: it '
                            'belongs to another data set.')
    return arrays


def only_folder(root, dataset, prefix):
    """The name of the only folder under <root>/<dataset> that starts with prefix."""
    if not root:
        raise UserError('--momask_root is missing: give the folder of the official weights.')
    folder = Path(root, dataset)
    if not folder.is_dir():
        raise UserError(f'{folder} is not a folder: --momask_root should hold {dataset}/ of the '
                        'official download (USAGE.md).')
    found = sorted(path.name for path in folder.glob(f'{prefix}*'))
    if len(found) != 1:
        raise UserError(f'{folder} has {len(found)} folders whose names start with {prefix} '
                        f'({", ".join(found)}), expected one: name it.')
    return found[0]
