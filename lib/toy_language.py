"""The language of the toy set: scripts of one to three actions, and captions that describe them."""
import json
import re
from pathlib import Path

from lib.configurator import ROOT

LANGUAGE = json.loads(Path(ROOT, 'config', 'toy_language.json').read_text())
SIDED = {'side-step', 'turn', 'kick', 'punch', 'wave'}
SPEEDS = {'slow': 0.75, 'normal': 1.0, 'fast': 1.3}  # the pace of an action


def make_script(rng):
    """A random script. Its actions differ, so that the word pairs of a caption determine their
    order. Sitting down comes last, because there is no action for standing up."""
    n = rng.choice([1, 2, 3], p=[0.22, 0.53, 0.25])
    actions = rng.permutation(list(LANGUAGE['phrases']))[:n].tolist()
    actions.sort(key=lambda action: action == 'sit down')
    script = []
    for action in actions:
        side = str(rng.choice(['left', 'right'])) if action in SIDED else None
        speed = str(rng.choice(list(SPEEDS), p=[0.2, 0.6, 0.2]))
        script.append({'action': action, 'side': side, 'speed': speed})
    return script


def caption(script, rng):
    """Script -> (text, tokens), one of many ways to say it. Phrases consist of word/TAG or
    word=lemma/TAG; tokens are 'lemma/TAG lemma/TAG ...'. The marker of an item ("then", "finally")
    comes right before its verb and its speed comes last, so that word pairs alone tell the order.
    """
    def pick(options):
        return options[rng.integers(len(options))]

    parts = [pick(LANGUAGE['subjects'])]
    for markers, item in zip(LANGUAGE['markers'], script):
        if len(script) > 1:
            parts.append(pick(markers))
        phrase = pick(LANGUAGE['phrases'][item['action']])
        parts.append(phrase.format(side=item['side']))
        parts.append(pick(LANGUAGE['adverbs'][item['speed']]))
    tagged = ' '.join(part for part in parts if part)
    text = re.sub(r'(=\w+)?/[A-Z]+', '', tagged).replace(' ,', ',')
    tokens = re.sub(r'\w+=|, ', '', tagged)
    return text, tokens
