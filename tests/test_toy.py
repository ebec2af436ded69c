"""The toy set must be worth learning from: bodies that keep their shape and their feet still,
captions that say what happens, and detectors strict and forgiving enough that "85% of generated
motion passes" means something."""
import re

import numpy as np
import pytest

from lib import detect
from lib import toy

N = 300
PARENTS = [-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19]
FEET = [toy.L_ANKLE, toy.L_TOE, toy.R_ANKLE, toy.R_TOE]
STANDING = [toy.TOE_Y + toy.HEEL[1], toy.TOE_Y] * 2  # their heights on the floor
FAST = {'run', 'kick', 'jump'}
FLYING = {'run', 'jump', 'hop'}


@pytest.fixture(scope='module')
def clips():
    return [toy.make_clip(7_000_000 + i) for i in range(N)]


def unchanged(joints):
    return joints


def rate(clips, change=unchanged, shift=0):
    """The share of clips, changed, that pass the script of the clip so many further on."""
    scripts = [clip['script'] for clip in clips]
    scripts = scripts[shift:] + scripts[:shift]
    return np.mean([detect.passes(change(c['joints']), s) for c, s in zip(clips, scripts)])


def perform(*actions, side='left', seed=0):
    """These actions, one after the other -> joints (T, 22, 3)."""
    plan = toy.Plan(np.random.default_rng(seed))
    for action in actions:
        toy.ACTIONS[action](plan, 1 if side == 'right' else 0, 1.0)
    return toy.body(plan, int((plan.t + 0.3) * toy.FPS))


def item(action, side=None):
    return {'action': action, 'side': side, 'speed': 'normal'}


def test_same_seed_same_clip():
    a, b, c = toy.make_clip(3), toy.make_clip(3), toy.make_clip(4)
    assert np.array_equal(a['joints'], b['joints'])
    assert a['captions'] == b['captions'] and a['script'] == b['script']
    assert a['joints'].shape != c['joints'].shape or not np.array_equal(a['joints'], c['joints'])


def test_shapes_and_lengths(clips):
    for c in clips:
        t = len(c['joints'])
        assert c['joints'].shape == (t, 22, 3) and c['joints'].dtype == np.float32
        assert np.isfinite(c['joints']).all()
        assert toy.MIN_FRAMES <= t <= toy.MAX_FRAMES
        actions = [i['action'] for i in c['script']]
        assert 1 <= len(actions) <= 3 and len(set(actions)) == len(actions)
        assert 'sit down' not in actions[:-1]
    assert {i['action'] for c in clips for i in c['script']} == set(toy.ACTIONS)


def test_starts_at_the_origin_facing_z_with_left_at_plus_x(clips):
    for c in clips:
        first = c['joints'][0]
        assert np.abs(first[0, [0, 2]]).max() < 1e-6
        across = first[toy.L_HIP] - first[toy.R_HIP]
        assert across[0] > 0.1 and abs(across[2]) < 0.02
        toes, ankles = first[[toy.L_TOE, toy.R_TOE], 2], first[[toy.L_ANKLE, toy.R_ANKLE], 2]
        assert (toes > ankles + 0.1).all()


def test_bones_keep_their_length(clips):
    joints = np.concatenate([c['joints'] for c in clips])
    bones = np.linalg.norm(joints[:, 1:] - joints[:, PARENTS[1:]], axis=-1)
    assert np.ptp(bones, axis=0).max() < 1e-4  # over all clips: there is one body


def test_planted_feet_stand_still_and_others_move(clips):
    share = []
    for c in clips:
        feet = c['joints'][:, FEET]
        above = np.abs(feet[..., 1] - STANDING)
        down = above < 1e-6
        planted = down[:-1] & down[1:]
        moved = np.linalg.norm(np.diff(feet, axis=0), axis=-1)
        assert moved[planted].max() < 1e-4
        if not FLYING & {i['action'] for i in c['script']}:
            assert above.min(1).max() < 1e-3  # one always stands on the floor
        share.append((moved[~planted] > 0.01).mean() if (~planted).any() else 1.0)
    assert np.mean(share) > 0.8


def test_nothing_under_the_floor_and_nothing_jumps(clips):
    for c in clips:
        joints = c['joints'].astype(float)
        fast = FAST & {i['action'] for i in c['script']}
        assert joints[..., 1].min() > -0.01
        speed = np.linalg.norm(np.diff(joints, axis=0), axis=-1) * toy.FPS
        assert speed[:, toy.PELVIS].max() < 4.5
        assert speed.max() < (10 if fast else 7)
        bend = np.linalg.norm(np.diff(joints, 2, axis=0), axis=-1)
        assert bend.max() < (0.32 if fast else 0.2)


def test_knees_bend_forward_and_elbows_back(clips):
    for c in clips:
        j, view = c['joints'].astype(float), detect.View(c['joints'])
        for side in (0, 1):
            thigh = view.local(j[:, toy.L_KNEE + side] - j[:, toy.L_HIP + side])
            shin = view.local(j[:, toy.L_ANKLE + side] - j[:, toy.L_KNEE + side])
            assert (np.cross(thigh, shin)[:, 0] > -0.01).all()  # from thigh to shin to the rear
    joints = perform()
    view = detect.View(joints)
    hanging = view.local(joints[:, toy.L_ELBOW] - joints[:, toy.L_SHOULDER])
    assert (hanging[:, 2] < 0.02).all() and (hanging[:, 1] < -0.2).all()


@pytest.mark.parametrize('action', ['run', 'jump', 'hop'])
def test_airborne(action):
    toes = perform(action)[:, [toy.L_TOE, toy.R_TOE], 1]
    assert (toes.min(1) > 0.03).any()


def noisy(joints, rng=np.random.default_rng(0)):
    """15 mm on average per joint, smooth in time."""
    noise = toy.smooth(rng.standard_normal(joints.shape), 0.1)
    return joints + 0.015 * noise / np.linalg.norm(noise, axis=-1).mean()


def blurred(joints):
    """As by a tokenizer."""
    return toy.smooth(joints.astype(float), 0.08)


def elsewhere(joints):
    return joints @ toy.rotation(2.0) + [3, 0.02, -1]


@pytest.mark.parametrize('change,least', [(unchanged, 0.98), (noisy, 0.95), (blurred, 0.95),
                                          (elsewhere, 0.98)])
def test_detectors_accept_their_own_clips(clips, change, least):
    assert rate(clips, change) >= least


def test_detectors_reject_other_scripts(clips):
    assert np.mean([rate(clips, shift=k) for k in (1, 10, 100)]) < 0.1


@pytest.mark.parametrize('action', toy.ACTIONS)
def test_each_action_is_detected_with_its_side_only(action):
    for seed in range(6):
        side, other = ('left', 'right') if seed % 2 == 0 else ('right', 'left')
        joints = perform(action, side=side, seed=seed)
        assert detect.passes(joints, [item(action)])
        if action in toy.SIDED:
            assert detect.passes(joints, [item(action, side)])
            assert not detect.passes(joints, [item(action, other)])
        others = [a for a in toy.ACTIONS if a != action]
        assert sum(detect.passes(joints, [item(a)]) for a in others) <= 1


def test_order_counts():
    joints = perform('walk', 'bow')
    assert detect.passes(joints, [item('walk'), item('bow')])
    assert not detect.passes(joints, [item('bow'), item('walk')])
    assert not detect.passes(perform(), [item('walk')])


def test_captions_read_back(clips):
    for c in clips:
        assert len({text for text, _ in c['captions']}) >= 3
        for text, tokens in c['captions']:
            assert detect.parse(text) == c['script'], text
            assert len(tokens.split()) == len(text.replace(',', '').split())
            for token in tokens.split():
                assert re.fullmatch(r'[a-z]+/(DET|NOUN|VERB|ADV|ADP|ADJ|NUM|PRON|AUX|CCONJ)', token)


def test_order_is_in_adjacent_words(clips):
    """The word before an item's verb says its place: the text vectors know no more of order."""
    places = [('person', 'man', 'someone', 'first'), ('then', 'next', 'that'),
              ('finally', 'lastly')]
    for c in clips:
        for _, tokens in c['captions']:
            words = tokens.split()
            verbs = [i for i, word in enumerate(words) if word.endswith('/VERB')]
            assert len(verbs) == len(c['script'])
            for verb, before in zip(verbs, places):
                assert words[verb - 1].split('/')[0] in before


@pytest.mark.parametrize('text,expected', [
    ('a person walks forward, then kicks with the left leg',
     [('walk', None, 'normal'), ('kick', 'left', 'normal')]),
    ('Someone is jogging slowly and then they sit down.',
     [('run', None, 'slow'), ('sit down', None, 'normal')]),
    ('a woman steps to the right, waves her left hand, finally bows',
     [('side-step', 'right', 'normal'), ('wave', 'left', 'normal'), ('bow', None, 'normal')]),
    ('a person walks quickly', [('walk', None, 'fast')]),
    ('a man kicks', [('kick', None, 'normal')]),
    ('a person juggles three burning torches', None),
    ('a person walks like an elephant', None),
    ('a person walks backwards', None),
    ('a man backs up, then bows', None),
    ('someone spins around', None),
    ('a person sits down and then stands up', None),
    ('a person stands still', None),
    ('', None),
])
def test_parse_prompts(text, expected):
    script = detect.parse(text)
    assert (script and [(i['action'], i['side'], i['speed']) for i in script]) == expected
