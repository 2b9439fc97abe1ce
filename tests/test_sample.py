"""sample.py on a tiny checkpoint that babbles bytes: nothing but text may reach the terminal."""
from dataclasses import asdict

import pytest
import torch

import sample
from configurator import Refusal
from model import GPT, GPTConfig
from runs import save_checkpoint


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder, config = tmp_path_factory.mktemp('run'), GPTConfig(257, 48, 1, 2, 16)
    torch.manual_seed(0)
    state = dict(step=3, model=GPT(config).state_dict(), model_config=asdict(config), encoding='bytes', link_order=2,
                 config={})
    save_checkpoint(folder, state, 'best.pt')
    save_checkpoint(folder, dict(state, step=4, link_order=0))
    return str(folder)


def printed(capsys, run, **options):
    options = {**dict(prompt='Rusty kettle, help!'), **options}
    sample.main(sample.Config(out_dir=run, device='cpu', max_new_tokens=20, **options))
    return capsys.readouterr().out


def test_samples_are_printable(capsys, run):
    out = printed(capsys, run, num_samples=20)
    assert out.count('Rusty kettle, help!\nA:\n') == 20
    assert all(c.isprintable() or c == '\n' for c in out) and '\\x' in out and '[cut]\n' in out


def test_samples_are_seeded_and_may_follow_the_link(capsys, run):
    first, again, other, link = (printed(capsys, run, **o) for o in ({}, {}, dict(seed=1), dict(link=True)))
    assert first == again != other and 'link_2' in link and 'link_' not in first
    with pytest.raises(Refusal, match='leave out --link'):
        printed(capsys, run, link=True, checkpoint='last')


def test_a_long_post_leaves_room(capsys, run):
    out = printed(capsys, run, prompt='x' * 100 + ' Rusty kettle, help!')
    assert 'the post has 124 tokens; its first 88 are dropped' in out
    assert 'dropped' not in printed(capsys, run, prompt='x' * 32)


def test_prompt_files(capsys, run, tmp_path):
    file = tmp_path / 'posts.txt'
    file.write_text('\ufeffOne?\n\nTwo\u2028?\n')
    out = printed(capsys, run, prompt='', prompt_file=str(file))
    assert '\nOne?\nA:\n' in out and '\ufeff' not in out and out.count('\nA:\n') == 2
    assert 'set exactly one of' in ''.join(sample.Config(out_dir=run).check())
