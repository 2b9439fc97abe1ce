"""Registers, spills and shared memory of extras/kernels.py on Hopper. No GPU is needed: pip install triton, run it."""
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.append(str(Path(__file__).parents[2]))
from extras.kernels import _error  # noqa: E402

PTXAS = next((Path(triton.__file__).parent / 'backends/nvidia/bin').glob('ptxas*'))
for dtype in ('bf16', 'fp16', 'fp32'):
    for block, warps in ((4096, 16), (4096, 8), (8192, 16)):
        signature = dict(logits='*' + dtype, targets='*i64', log_odds='*fp32', vocab_size='i32', width='i32',
                         block='constexpr')
        source = ASTSource(_error, signature, {(5,): block})
        kernel = triton.compile(source, target=GPUTarget('cuda', 90, 32), options=dict(num_warps=warps))
        with tempfile.NamedTemporaryFile('w', suffix='.ptx') as f:
            f.write(kernel.asm['ptx'])
            f.flush()
            done = subprocess.run([PTXAS, '-v', '--gpu-name=sm_90a', f.name, '-o', '/dev/null'], capture_output=True,
                                  text=True, check=True)
        registers, = re.findall(r'Used (\d+) registers', done.stderr)
        spilled, = re.findall(r'(\d+) bytes spill stores', done.stderr)
        print(f'{dtype}, blocks of {block}, {warps} warps: {registers} registers, {spilled} bytes spilled, '
              f'{kernel.metadata.shared} bytes shared')
