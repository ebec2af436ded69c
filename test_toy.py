"""The toy set must be worth learning from: bodies that keep their shape and their feet still, captions that say what happens,
and detectors strict and forgiving enough that "85% of generated motion passes" means something."""
import re

import numpy as np
import pytest

import toy

N = 300
PARENTS = [-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19]
FEET = [toy.L_ANKLE, toy.L_TOE, toy.R_ANKLE, toy.R_TOE]


@pytest.fixture(scope='module')
def clips():
    return toy.generate(N, seed=7)


def rate(clips, change=lambda joints: joints, shift=0):
    scripts = [c['script'] for c in clips]
    return np.mean([toy.passes(change(c['joints']), s) for c, s in zip(clips, scripts[shift:] + scripts[:shift])])


def perform(*actions, side='left', seed=0):
    """These actions, one after the other -> joints (T, 22, 3)."""
    plan = toy.Plan(np.random.default_rng(seed))
    if actions[0] == 'stand up':
        plan.move(0.0, 0.0, **plan.seated())
    for action in actions:
        getattr(plan, re.sub('[ -]', '_', action))(1 if side == 'right' else 0, 1.0)
    return toy.body(plan, int((plan.t + 0.3) * toy.FPS))[0]


def test_same_seed_same_clip():
    a, b, c = toy.make_clip(3), toy.make_clip(3), toy.make_clip(4)
    assert np.array_equal(a['joints'], b['joints']) and a['captions'] == b['captions'] and a['script'] == b['script']
    assert a['joints'].shape != c['joints'].shape or not np.array_equal(a['joints'], c['joints'])
    assert np.array_equal(toy.generate(2, 5)[1]['joints'], toy.make_clip(5 * 1_000_003 + 1)['joints'])


def test_shapes_and_lengths(clips):
    for c in clips:
        t = len(c['joints'])
        assert c['joints'].shape == (t, 22, 3) and c['joints'].dtype == np.float32 and np.isfinite(c['joints']).all()
        assert toy.MIN_FRAMES <= t <= toy.MAX_FRAMES
        assert c['planted'].shape == (t, 4) and c['planted'].dtype == bool
        assert 1 <= len(c['script']) <= 3
    assert {i['action'] for c in clips for i in c['script']} == set(toy.ACTIONS)


def test_starts_at_the_origin_facing_z_with_left_at_plus_x(clips):
    for c in clips:
        first = c['joints'][0]
        assert np.abs(first[0, [0, 2]]).max() < 1e-6
        across = first[toy.L_HIP] - first[toy.R_HIP]
        assert across[0] > 0.1 and abs(across[2]) < 0.02
        assert (first[[toy.L_TOE, toy.R_TOE], 2] > first[[toy.L_ANKLE, toy.R_ANKLE], 2] + 0.1).all()  # toes point ahead


def test_bones_keep_their_length(clips):
    bones = np.concatenate([np.linalg.norm(c['joints'][:, 1:] - c['joints'][:, PARENTS[1:]], axis=-1) for c in clips])
    assert np.ptp(bones, axis=0).max() < 1e-4  # over all clips: there is one body


def test_planted_feet_stand_still_and_others_move(clips):
    share = []
    for c in clips:
        moved = np.linalg.norm(np.diff(c['joints'][:, FEET], axis=0), axis=-1)
        planted = c['planted'][:-1]
        assert moved[planted].max() < 1e-4
        assert c['joints'][:-1][:, FEET, 1][planted].max() < 0.1  # and stand on the floor
        share.append((moved[~planted] > 0.01).mean() if (~planted).any() else 1.0)
    assert np.mean(share) > 0.8


def test_nothing_under_the_floor_and_nothing_jumps(clips):
    for c in clips:
        joints, actions = c['joints'].astype(float), {i['action'] for i in c['script']}
        assert joints[..., 1].min() > -0.01
        speed = np.linalg.norm(np.diff(joints, axis=0), axis=-1) * toy.FPS
        assert speed[:, toy.PELVIS].max() < 4.5 and speed.max() < (10 if actions & {'run', 'kick', 'jump'} else 7)
        assert np.linalg.norm(np.diff(joints, 2, axis=0), axis=-1).max() < (0.32 if actions & {'run', 'kick', 'jump'} else 0.2)


def test_knees_bend_forward_and_elbows_back(clips):
    for c in clips:
        j, view = c['joints'].astype(float), toy.View(c['joints'])
        for side in (0, 1):
            shin = view.local(j[:, toy.L_ANKLE + side] - j[:, toy.L_KNEE + side])
            thigh = view.local(j[:, toy.L_KNEE + side] - j[:, toy.L_HIP + side])
            assert (np.cross(thigh, shin)[:, 0] > -0.01).all()  # turning from thigh to shin is to the rear
    joints = perform('idle')
    hanging = toy.View(joints).local(joints[:, toy.L_ELBOW] - joints[:, toy.L_SHOULDER])
    assert (hanging[:, 2] < 0.02).all() and (hanging[:, 1] < -0.2).all()


@pytest.mark.parametrize('action', ['run', 'jump', 'hop'])
def test_airborne(action):
    toes = perform(action)[:, [toy.L_TOE, toy.R_TOE], 1]
    assert (toes.min(1) > 0.03).any()


def test_detectors_accept_their_own_clips(clips):
    assert rate(clips) >= 0.98
    rng = np.random.default_rng(0)

    def noisy(joints):  # 15 mm on average per joint, smooth in time
        noise = toy.smooth(rng.standard_normal(joints.shape), 0.1)
        return joints + 0.015 * noise / np.linalg.norm(noise, axis=-1).mean()
    assert rate(clips, noisy) >= 0.95
    assert rate(clips, lambda j: toy.smooth(j.astype(float), 0.08)) >= 0.95  # a tokenizer blurs
    assert rate(clips, lambda j: j @ toy.rotation(np.array(2.0)) + [3, 0.02, -1]) >= 0.98  # anywhere, facing anywhere


def test_detectors_reject_other_scripts(clips):
    assert np.mean([rate(clips, shift=k) for k in (1, 10, 100)]) < 0.1


@pytest.mark.parametrize('action', toy.ACTIONS)
def test_each_action_is_detected_with_its_side_only(action):
    seen = 0
    for seed in range(6):
        side = ['left', 'right'][seed % 2] if action in toy.SIDED else None
        joints = perform(action, side=side, seed=seed)
        seen += toy.detect(joints, {'action': action, 'side': side, 'speed': 'normal'})
        if side:
            assert not toy.detect(joints, {'action': action, 'side': 'right' if side == 'left' else 'left', 'speed': 'normal'})
            assert toy.detect(joints, {'action': action, 'side': None, 'speed': 'normal'})
        others = [a for a in toy.ACTIONS if a != action]
        assert sum(toy.detect(joints, {'action': a, 'side': None, 'speed': 'normal'}) for a in others) <= 1
    assert seen == 6


def test_order_counts_and_standing_is_no_idling():
    walk, bow, idle = ({'action': a, 'side': None, 'speed': 'normal'} for a in ('walk', 'bow', 'idle'))
    joints = perform('walk', 'bow')
    assert toy.passes(joints, [walk, bow]) and not toy.passes(joints, [bow, walk])
    assert not toy.passes(joints, [idle]) and not toy.passes(perform('walk', 'idle'), [idle])
    assert toy.passes(perform('walk', 'idle'), [walk, idle]) and toy.passes(perform('idle'), [idle])
    assert not toy.detect(perform('sit down'), idle)


def test_captions_read_back(clips):
    for c in clips:
        assert len({text for text, _ in c['captions']}) >= 3
        for text, tokens in c['captions']:
            assert toy.parse(text) == c['script'], text
            assert len(tokens.split()) == len(text.replace(',', '').split())
            assert all(re.fullmatch(r"[a-z]+/(DET|NOUN|VERB|ADV|ADP|ADJ|NUM|PRON|AUX|CCONJ)", t) for t in tokens.split())


def test_order_is_in_adjacent_words(clips):
    """The word before an item's verb says its place: the text vectors know no more of order than that."""
    for c in clips:
        for _, tokens in c['captions']:
            words = tokens.split()
            before = [words[i - 1].split('/')[0] for i, w in enumerate(words) if w.endswith('/VERB')]
            assert len(before) == len(c['script'])
            for place, word in enumerate(before):
                assert word in [('person', 'man', 'someone', 'first'), ('then', 'next', 'that'), ('finally', 'lastly')][place]


@pytest.mark.parametrize('text,expected', [
    ('a person walks forward, then kicks with the left leg', [('walk', None, 'normal'), ('kick', 'left', 'normal')]),
    ('Someone is jogging slowly and then they sit down.', [('run', None, 'slow'), ('sit down', None, 'normal')]),
    ('a woman steps to the right, waves her left hand, finally bows',
     [('side-step', 'right', 'normal'), ('wave', 'left', 'normal'), ('bow', None, 'normal')]),
    ('a person walks backward quickly', [('walk backwards', None, 'fast')]),
    ('a man kicks', [('kick', None, 'normal')]),
    ('a person juggles three burning torches', None),
    ('a person walks like an elephant', None),
    ('', None),
])
def test_parse_prompts(text, expected):
    script = toy.parse(text)
    assert (script and [(i['action'], i['side'], i['speed']) for i in script]) == expected
