"""Settings of pytest: by default all tests run but those that take long."""
import os
import subprocess

import hypothesis

os.environ['OMP_NUM_THREADS'] = '1'  # models this small: two threads wait for each other longer than they compute

hypothesis.settings.register_profile('suite', max_examples=100, derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile('long', max_examples=20_000, deadline=None, database=None,
                                     suppress_health_check=list(hypothesis.HealthCheck))
hypothesis.settings.load_profile('suite')


def pytest_configure(config):
    config.addinivalue_line('markers', 'soak: hundreds of killed runs; python -m pytest -m soak')
    config.option.markexpr = config.option.markexpr or 'not soak'


def succeed(command):
    """Runs it; where it fails, its output is the message of the test."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f'exit code {done.returncode}\n{done.stdout}'
