"""toy.py and detect.py: bodies must keep their shape and their feet still, captions must say what
happens, and detectors must be strict and forgiving enough that a pass rate means something."""
import re

import numpy as np
import pytest

from lib import detect, toy, toy_language
from lib.motion import SKELETONS

PARENTS = SKELETONS['smpl22'].parents
FEET = toy.ANKLES + toy.TOES
FEET_ON_FLOOR = [toy.TOE_Y + toy.TOE_TO_ANKLE[1]] * 2 + [toy.TOE_Y] * 2   # their heights


@pytest.fixture(scope='module')
def clips():
    return [toy.make_clip(7_000_000 + i) for i in range(300)]


def actions_of(clip):
    return {item['action'] for item in clip['script']}


def item(action, side=None):
    return {'action': action, 'side': side, 'speed': 'normal'}


def perform(*actions, side='left', seed=0):
    """Joints (T, 22, 3) of these actions, one after the other."""
    plan = toy.Plan(np.random.default_rng(seed))
    for action in actions:
        toy.ACTIONS[action](plan, ('left', 'right').index(side), 1.0)
    return toy.body(plan, int((plan.t + 0.3) * toy.FPS))


def test_same_seed_same_clip(clips):
    again = toy.make_clip(7_000_000)
    assert np.array_equal(clips[0]['joints'], again['joints'])
    assert clips[0]['captions'] == again['captions']
    assert len({clip['joints'].tobytes() for clip in clips}) == len(clips)


def test_scripts_and_first_frames(clips):
    assert set.union(*map(actions_of, clips)) == set(toy.ACTIONS)
    for clip in clips:
        assert 1 <= len(actions_of(clip)) == len(clip['script']) <= 3   # no action twice
        assert 'sit down' not in [item['action'] for item in clip['script'][:-1]]
        assert toy.MIN_FRAMES <= len(clip['joints']) <= toy.MAX_FRAMES
        first = clip['joints'][0]   # at the origin, faces Z+
        assert np.abs(first[0, [0, 2]]).max() < 1e-6
        left_hip, right_hip = first[toy.HIPS]
        assert left_hip[0] > right_hip[0] + 0.1
        assert abs(left_hip[2] - right_hip[2]) < 0.02
        assert (first[toy.TOES, 2] > first[toy.ANKLES, 2] + 0.1).all()


def test_bones_keep_their_length(clips):
    joints = np.concatenate([clip['joints'] for clip in clips])
    assert joints.dtype == np.float32
    lengths = np.linalg.norm(joints - joints[:, PARENTS], axis=-1)
    assert np.ptp(lengths, axis=0).max() < 1e-4  # the same body in all clips


def test_planted_feet_do_not_move(clips):
    moving = []
    for clip in clips:
        feet = clip['joints'][:, FEET]
        above = np.abs(feet[..., 1] - FEET_ON_FLOOR)
        planted = (above[:-1] < 1e-6) & (above[1:] < 1e-6)
        step = np.linalg.norm(np.diff(feet, axis=0), axis=-1)
        assert step[planted].max() < 1e-4
        lifted = above.min(1).max()   # of the lower foot
        assert lifted > 0.01 if {'run', 'jump', 'hop'} & actions_of(clip) else lifted < 1e-3
        if not planted.all():
            moving.append((step[~planted] > 0.01).mean())
    assert np.mean(moving) > 0.8  # feet that are not planted move


def test_joints_stay_above_the_floor_and_move_smoothly(clips):
    for clip in clips:
        joints = clip['joints'].astype(float)
        fast = {'run', 'kick', 'jump'} & actions_of(clip)
        assert joints[..., 1].min() > -0.01
        speed = np.linalg.norm(np.diff(joints, axis=0), axis=-1) * toy.FPS
        assert speed[:, toy.PELVIS].max() < 4.5
        assert speed.max() < (10 if fast else 7)
        bend = np.linalg.norm(np.diff(joints, 2, axis=0), axis=-1)
        assert bend.max() < (0.32 if fast else 0.2)


def test_knees_bend_forward_and_elbows_back(clips):
    for clip in clips:
        view = detect.View(clip['joints'])
        view.joints = clip['joints'].astype(float)   # not smoothed
        for hip, knee, ankle in zip(toy.HIPS, toy.KNEES, toy.ANKLES):
            # the shin points backwards from the thigh: the axis of the bend is to the left
            axis = np.cross(view.between(hip, knee), view.between(knee, ankle))
            assert (axis[:, detect.LEFT] > -0.01).all()
    view = detect.View(perform())
    upper_arm = view.between(toy.SHOULDERS[0], toy.ELBOWS[0])
    assert (upper_arm[:, detect.FORWARD] < 0.02).all() and (upper_arm[:, detect.UP] < -0.2).all()


# --------------------------------------------------------------------------------------- detectors


def noisy(joints, rng=np.random.default_rng(0)):
    """Noise of 15 mm on average per joint, smooth in time."""
    noise = toy.smooth(rng.standard_normal(joints.shape), 0.1)
    return joints + 0.015 * noise / np.linalg.norm(noise, axis=-1).mean()


@pytest.mark.parametrize('change, least', [
    (lambda joints: joints, 0.98), (noisy, 0.95),
    (lambda joints: toy.smooth(joints.astype(float), 0.08), 0.95),   # as by a tokenizer
    (lambda joints: joints @ toy.rotation(2.0) + [3, 0.02, -1], 0.98)])
def test_detectors_accept_the_clip_of_a_script(clips, change, least):
    passed = [detect.passes(change(clip['joints']), clip['script']) for clip in clips]
    assert np.mean(passed) >= least


def test_detectors_reject_other_clips(clips):
    passed = [detect.passes(clip['joints'], clips[i - shift]['script'])
              for shift in (1, 10, 100) for i, clip in enumerate(clips)]
    assert np.mean(passed) < 0.1


@pytest.mark.parametrize('action', toy.ACTIONS)
def test_each_action_is_detected_on_its_own_side_only(action):
    for seed in range(6):
        side, other = ('left', 'right') if seed % 2 else ('right', 'left')
        joints = perform(action, side=side, seed=seed)
        assert detect.passes(joints, [item(action)])
        if action in toy_language.SIDED:
            assert detect.passes(joints, [item(action, side)])
            assert not detect.passes(joints, [item(action, other)])
        assert sum(detect.passes(joints, [item(a)]) for a in toy.ACTIONS) <= 2   # it and one more


def test_detectors_check_the_order():
    joints = perform('walk', 'bow')
    assert detect.passes(joints, [item('walk'), item('bow')])
    assert not detect.passes(joints, [item('bow'), item('walk')])
    assert not detect.passes(perform(), [item('walk')])


# ---------------------------------------------------------------------------------------- language


def test_captions_parse_to_their_script(clips):
    """They also tell the order in adjacent words: text vectors (lib/text.py) know no more of it."""
    before_verb = [('person', 'man', 'someone', 'first'), ('then', 'next', 'that'),
                   ('finally', 'lastly')]
    for clip in clips:
        assert len({text for text, _ in clip['captions']}) >= 3
        for text, tokens in clip['captions']:
            assert detect.parse(text) == clip['script'], text
            tokens = tokens.split()
            assert len(tokens) == len(text.replace(',', '').split())
            for token in tokens:
                assert re.fullmatch(r'[a-z]+/(DET|NOUN|VERB|ADV|ADP|ADJ|NUM|PRON|CCONJ)', token)
            verbs = [i for i, token in enumerate(tokens) if token.endswith('/VERB')]
            assert len(verbs) == len(clip['script'])
            for verb, words in zip(verbs, before_verb):
                assert tokens[verb - 1].split('/')[0] in words


@pytest.mark.parametrize('text, expected', [
    ('Someone is jogging slowly and then they sit down.',
     [('run', None, 'slow'), ('sit down', None, 'normal')]),
    ('a woman steps to the right, waves her left hand, finally bows quickly',
     [('side-step', 'right', 'normal'), ('wave', 'left', 'normal'), ('bow', None, 'fast')]),
    ('a man kicks', [('kick', None, 'normal')]),
    ('a person juggles three burning torches', []), ('a person walks like an elephant', []),
    ('a person walks backwards', []), ('a person sits down and then stands up', []), ('', [])])
def test_prompts_beyond_the_grammar(text, expected):
    script = detect.parse(text)
    assert [(i['action'], i['side'], i['speed']) for i in script or []] == expected
