"""Where a model fails: FID of groups of clips (DynMask 4.4), and the cross-entropy of tokens by how
fast the body moves there (the premise of DynMask 3.2)."""
import json
import re
from pathlib import Path

import numpy as np
import torch
from scipy.stats import rankdata, spearmanr

from lib.configurator import ROOT
from lib.evaluator import fid

STRATA = ('static', 'dynamic', 'static (ours)', 'dynamic (ours)',   # Table 5
          'simple', 'medium', 'complex', 'short', 'middle', 'long')   # Table 6, and by length
QUARTERS = ('slowest quarter', 'second', 'third', 'fastest quarter')


def clip_strata(texts, joints):
    """Captions (N str) and real joints, N of (T, J, 3) -> {stratum: clip numbers}.

    Table 5: clips with a static or a dynamic word in the caption, inflections included. A clip with
    both is dynamic, one with neither belongs to no stratum. '(ours)' also has our synonyms of the
    paper's words.
    Table 6: terciles by mean joint speed and length (the sum of their ranks); no MSD is involved.
    """
    word_lists = json.loads(Path(ROOT, 'config', 'strata_words.json').read_text(encoding='utf-8'))
    words = {kind: {form for verb, forms in verbs.items() for form in (verb, *forms)}
             for kind, verbs in word_lists.items()}
    words_of_clip = [set(re.findall('[a-z]+', text.lower())) for text in texts]
    strata = {}
    for version in ('', ' (ours)'):
        static = words['static'] | words['static' + version]
        dynamic = words['dynamic'] | words['dynamic' + version]
        is_dynamic = np.array([bool(found & dynamic) for found in words_of_clip])
        is_static = np.array([bool(found & static) for found in words_of_clip]) & ~is_dynamic
        strata['static' + version] = np.flatnonzero(is_static)
        strata['dynamic' + version] = np.flatnonzero(is_dynamic)

    speed = np.array([np.linalg.norm(np.diff(j, axis=0), axis=-1).mean() for j in joints])
    length = np.array([len(j) for j in joints])
    speed_and_length = rankdata(speed, 'ordinal') + rankdata(length, 'ordinal')
    for names, key in ((STRATA[4:7], speed_and_length), (STRATA[7:], length)):
        strata.update(zip(names, np.array_split(key.argsort(kind='stable'), 3)))
    return strata


def strata_fids(draws):
    """FID of each stratum, with the embeddings of several draws of the same clips pooled. (A few
    dozen clips in 512 dimensions are mostly bias.)

    draws: list of (embeddings {row: (N, d)}, strata {name: clip numbers}) -> {row: {'FID <name>':
    value}}, for strata of at least two clips, and the ratio of dynamic to static.
    """
    rows = draws[0][0]
    result = {row: {} for row in rows}
    for name in draws[0][1]:
        pooled = {row: np.concatenate([emb[row][strata[name]] for emb, strata in draws])
                  for row in rows}
        if len(pooled['real motion']) < 2:
            continue
        for row in rows:
            result[row][f'FID {name}'] = fid(pooled['real motion'], pooled[row])
    for row in rows:
        if row != 'real motion' and {'FID static', 'FID dynamic'} <= result[row].keys():
            ratio = result[row]['FID dynamic'] / result[row]['FID static']
            result[row]['dynamic / static'] = ratio
    return result


def token_speed(joints, fps, per_token=4):
    """Joints (T, J, 3) in metres -> mean joint speed in each token (T // per_token,), in m/s."""
    speed = fps * np.linalg.norm(np.diff(joints, axis=0), axis=-1).mean(-1)
    speed = np.append(speed, speed[-1:])   # the last frame has no successor
    return speed[:len(speed) // per_token * per_token].reshape(-1, per_token).mean(1)


def hide_lowest(score, share, valid):
    """The `share` of each row's valid tokens with the lowest score (B, n) -> (B, n) bool."""
    n_hidden = (share * valid.sum(1)).round().clamp(min=1)
    rank = score.masked_fill(~valid, torch.inf).argsort(-1).argsort(-1)
    return (rank < n_hidden[:, None]) & valid


def error_by_speed(batches, log_probabilities, MASK, seed=0, shares=(0.3, 0.6, 0.9)):
    """Cross-entropy of masked tokens: mean, by quarter of joint speed, and rank correlation with
    measures of dynamics -> {'uniform 30%': {column: value}, ...}.

    batches: list of dicts with ids (B, n), valid (B, n) bool, confidence (B, n), and the measures
    speed, omega, velocity (B, n). Masks are uniform, or hide the tokens of lowest confidence, as
    decoding does: it leaves for last what the model is unsure of.
    log_probabilities: a function of a batch and its masked ids -> (B, n, V).
    """
    speeds = torch.cat([batch['speed'][batch['valid']] for batch in batches])
    edges = torch.quantile(speeds, torch.tensor([0.25, 0.5, 0.75]).to(speeds))
    found = {}
    for kind in ('uniform', 'confidence'):
        for share in shares:
            generator = torch.Generator().manual_seed(seed)
            hidden_tokens = []
            for batch in batches:
                score = batch['confidence']
                if kind == 'uniform':
                    score = torch.rand(score.shape, generator=generator).to(score)
                hidden = hide_lowest(score, share, batch['valid'])
                log_p = log_probabilities(batch, torch.where(hidden, MASK, batch['ids']))
                error = -log_p.gather(-1, batch['ids'][..., None])[..., 0]
                measures = error, batch['speed'], batch['omega'], batch['velocity']
                hidden_tokens.append(torch.stack([measure[hidden] for measure in measures]))
            found[f'{kind} {share:.0%}'] = summary_of_errors(torch.cat(hidden_tokens, 1), edges)
    return found


def summary_of_errors(measures, edges):
    """A row of `error_by_speed`: measures (4, tokens), edges (3,) of the speed's quarters."""
    quarter = torch.bucketize(measures[1], edges).cpu().numpy()
    error, speed, omega, velocity = measures.cpu().numpy()
    row = {'all': error.mean()}
    for i, name in enumerate(QUARTERS):
        part = error[quarter == i]
        row[name] = part.mean() if len(part) else np.nan
    return row | {'rho speed': rank_correlation(speed, error),
                  'rho omega': rank_correlation(omega, error),
                  'rho velocity': rank_correlation(velocity, error),
                  'rho omega, speed': rank_correlation(omega, speed)}


def rank_correlation(x, y):
    """Spearman's rho; NaN where one of them is constant."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.nan
    return spearmanr(x, y).statistic
