"""The runs of README.md that are not stored yet, some at a time: python results/known_truth/study.py --only=dpo

An arm is a run of preference.py. Conservative DPO, IPO and the language loss alone are methods of this file.
"""
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

HERE, OUT = Path(__file__).parent, 'out/known_truth'
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))
import preference  # noqa: E402
from configurator import Options, run  # noqa: E402
from losses import plackett_luce_loss  # noqa: E402

SMOOTHING = 0.1  # of conservative DPO: what the worse answers of a stage share

TOY = f'--init_from={OUT}/start --dtype=bfloat16 --eval_groups=200 --sample_batch=256'
DPO = (f'config/toy_dpo.py {TOY} --inner_epochs=1 --groups_per_iteration=7680 --learning_rate=5e-5 --min_lr=5e-5 '
       '--eval_interval=8')
REWARD = f'config/toy_reward.py {TOY}'
PPO = f'config/toy_ppo.py {TOY} --eval_interval=12'
JUDGED = f'{PPO} --reward_model={OUT}/reward_s%d'
PLAY = f'{TOY} --margin_stop=0'
ONE, TWO, THREE = (  # H opponents train on H + 1 answers a prompt and sample H: together equal tokens
    f'config/toy_spin.py {PLAY} --opponents={H} --iterations={iterations} --eval_interval={interval}'
    for H, iterations, interval in ((1, 70, 20), (2, 42, 12), (3, 30, 8)))
REDDIT = '--dataset=known_truth_reddit --max_answer_length=64'
TEXT = (f'{REDDIT} --init_from={OUT}/reddit-start --groups_per_step=32 --micro_groups=8 '
        '--eval_groups=0 --eval_samples=64 --warmup_iters=5 --learning_rate=1e-4')
PAIRS = f'config/dpo_shp.py {TEXT} --iterations=1 --groups_per_iteration=2048 --eval_interval=16'
NEEDED = {  # by arms
    'start': 'train.py config/toy_start.py --dtype=bfloat16',
    'start-t2': 'train.py config/toy_start.py --dtype=bfloat16 --taylor_order=2',
    'teacher': 'train.py config/toy_teacher.py --dtype=bfloat16',
    'reward': REWARD,
    'reward-rank2': f'{REWARD} --rank_order=2',
    'reddit-start': f'train.py config/t0_shp.py {REDDIT} --n_embd=64 --batch_size=20 --epochs=12 --min_lr=1e-3 '
                    '--warmup_iters=0 --dtype=bfloat16 --compile=False'}
ARMS = {
    'dpo': {
        'dpo': DPO,
        'dpo-rank2': f'{DPO} --rank_order=2',
        'dpo-beta0.3': f'{DPO} --beta=0.3',
        'dpo-beta0.3-rank2': f'{DPO} --beta=0.3 --rank_order=2',
        'dpo-beta3': f'{DPO} --beta=3',
        'dpo-beta3-rank2': f'{DPO} --beta=3 --rank_order=2',
        'dpo-k2': f'{DPO} --max_answers=2',
        'dpo-k2-rank2': f'{DPO} --max_answers=2 --rank_order=2',
        'dpo-plain': f'{DPO} --sft_weight=0',
        'dpo-plain-rank2': f'{DPO} --sft_weight=0 --rank_order=2',
        'cdpo': f'{DPO} --method=cdpo',
        'ipo': f'{DPO} --method=ipo',
        'ipo-beta0.3': f'{DPO} --method=ipo --beta=0.3',
        'language': f'{DPO} --method=language'},
    'ppo': {
        'ppo': JUDGED,
        'ppo-token2': f'{JUDGED} --token_order=2',
        'ppo-beta0.05': f'{JUDGED} --beta=0.05',
        'ppo-beta0.05-token2': f'{JUDGED} --beta=0.05 --token_order=2',
        'ppo-beta0.5': f'{JUDGED} --beta=0.5',
        'ppo-moment3': f'{JUDGED} --moment_order=3',
        'ppo-moment3-bare': f'{JUDGED} --moment_order=3 --monotone=False',
        'ppo-reward2': f'{PPO} --reward_model={OUT}/reward-rank2_s%d'},
    'selfplay': {
        'spin': ONE,
        'tied2': TWO,
        'tied3': THREE,
        'ordered2': f'{TWO} --league=ordered',
        'ordered3': f'{THREE} --league=ordered',
        'anchored2': f'{TWO} --anchor_first=True',
        'anchored3': f'{THREE} --anchor_first=True',
        'distill': f'config/toy_distill.py {PLAY} --teacher={OUT}/teacher --reward_model= --iterations=42 '
                   '--eval_interval=12'},
    'chain': {f'{name}-t2': command.replace(f'{OUT}/start ', f'{OUT}/start-t2 ')
              for name, command in dict(dpo=DPO, spin=ONE, ppo=JUDGED).items()},  # beside dpo, spin and ppo
    'reddit': {
        'reddit-reward': f'config/reward_shp.py {TEXT} --iterations=1 --groups_per_iteration=4096 --sft_weight=0 '
                         '--learning_rate=3e-4 --eval_interval=16',
        'reddit-dpo': PAIRS,
        'reddit-dpo-rank2': f'{PAIRS} --rank_order=2',
        'reddit-spin': f'config/spin_shp.py {TEXT} --opponents=1 --iterations=8 --groups_per_iteration=128 '
                       '--margin_stop=0 --eval_interval=8',
        'reddit-ppo': f'config/ppo_shp.py {TEXT} --reward_model={OUT}/reddit-reward_s%d --iterations=20 '
                      '--groups_per_iteration=16 --groups_per_step=16 --min_lr=1e-4 --eval_interval=10'}}


@dataclass(frozen=True)
class Config(Options):
    only: tuple[str, ...] = ()       # sections (dpo, ppo, selfplay, chain, reddit) or arms; none = all
    seeds: tuple[int, ...] = (0, 1)  # of the order of the data and of samples; the starts have seed 0
    jobs: int = 2                    # runs at a time, one thread each
    source: str = ''                 # reddit: folder of rows in SHP's schema


def main(cfg):
    if cfg.source and not Path('data/known_truth_reddit').exists():
        subprocess.run([sys.executable, ROOT / 'prepare_shp.py', f'--source={cfg.source}', *REDDIT.split()], check=True)
    with ThreadPoolExecutor(cfg.jobs) as pool:
        queue(pool, cfg.seeds, {name: command for section, arms in ARMS.items() for name, command in arms.items()
                                if not cfg.only or {section, name} & set(cfg.only)})


def queue(pool, seeds, arms):
    """Seed by seed, so that what is stored can be compared. What a run needs is queued before it, once."""
    commands, futures = NEEDED | ARMS['reddit'] | arms, {}

    def submit(name):
        if name not in futures:
            arm, _, seed = name.partition('_s')
            command = commands[arm] + (f' --seed={seed}' if seed else '')
            command = command.replace('%d', seed).split()
            needs = [submit(need) for need in re.findall(rf'{OUT}/(\S+)', ' '.join(command))]
            futures[name] = pool.submit(one, name, command, needs)
        return futures[name]
    for seed in seeds:
        for arm in arms:
            if not stored(f'{arm}_s{seed}').exists():
                submit(f'{arm}_s{seed}')


def stored(name):
    return HERE / 'runs' / f'{name}.jsonl'


def one(name, command, needs):
    """One run, after those that it needs, and resumed where it was broken off -> whether it is whole and stored."""
    out = Path(OUT, name)
    if not all(need.result() for need in needs):
        print(f'{name}: left out, for it needs a run that failed', flush=True)
        return False
    if stored(name).exists() and out.exists():  # needed by several arms, and made before
        return True
    script = [] if command[0] == 'train.py' else [__file__]
    begun = any(out.glob('ckpt_*'))
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(f'{out}.log', 'a') as log:
        done = subprocess.run([sys.executable, *script, *command, f'--out_dir={out}', f'--resume={begun}',
                               f'--overwrite={not begun}'], stdout=log, stderr=log,
                              env=os.environ | dict(OMP_NUM_THREADS='1'))
    if done.returncode == 0:
        stored(name).parent.mkdir(exist_ok=True)
        stored(name).write_text(''.join(f'{json.dumps(line)}\n' for line in evaluations(out)))
    print(f'{name}: {"stored" if done.returncode == 0 else f"failed, see {out}.log"}', flush=True)
    return done.returncode == 0


def evaluations(out):
    """The eval lines of a run; exact_groups, which the log has of each iteration of PPO, as its mean since the last."""
    exact = []
    for line in map(json.loads, (out / 'metrics.jsonl').read_text().splitlines()):
        if line['event'] == 'eval':
            yield line | (dict(exact_groups=mean(exact)) if exact else {})
            exact = []
        elif 'exact_groups' in line:
            exact.append(line['exact_groups'])


# Methods -------------------------------------------------------------------------------------------------------------


class Fork(preference.DPO):
    """DPO with another loss of the scores, (G, K) -> (G,), in the place of Plackett-Luce."""

    def loss(self, rows, counts):
        score, log_p = self.score(rows)
        loss = self.of_scores(score, rows.valid()).sum() / counts['groups']
        sft = -log_p[rows.owner % score.shape[1] == 0].sum() / counts['best_tokens']
        return loss + self.lab.cfg.sft_weight * sft, dict(loss=loss, sft_loss=sft)


class Conservative(Fork):
    """Label smoothing of each stage: the worse answers share 0.1 of it (K = 2: cDPO, Mitchell 2023)."""

    def of_scores(self, score, valid):
        gap, share = stages(score, valid)  # -log p_j = -log p_k + s_k - s_j for an answer j of stage k
        return plackett_luce_loss(score, 0, valid) + SMOOTHING * (share * gap).sum((1, 2))


class IPO(Fork):
    """(s_k - s_j - 1/2)^2, the mean over the answers j below k, for each stage k.

    With K = 2 this is beta^2 times the loss of Azar et al. 2023, which pulls log-ratios to a difference of 1/(2 beta).
    """

    def of_scores(self, score, valid):
        gap, share = stages(score, valid)
        return (share * (gap - 0.5) ** 2).sum((1, 2))


class Language(Fork):
    """The language loss of the best answers alone."""

    def of_scores(self, score, valid):
        return 0 * score.sum(1)


def stages(score, valid):
    """s_k - s_j for the answers j below k, 0 for others, and 1 / their number: (G, K) -> twice (G, K, K)."""
    below = (valid[:, :, None] & valid[:, None]).triu(1)
    gap = (score[:, :, None] - score[:, None]).masked_fill(~below, 0.0)
    return gap, below / below.sum(2, keepdim=True).clamp(min=1)


preference.METHODS.update(cdpo=Conservative, ipo=IPO, language=Language)

if __name__ == '__main__':
    if any(arg.startswith('config/') for arg in sys.argv[1:]):
        run(preference.main, preference.Config)
    else:
        run(main, Config)
