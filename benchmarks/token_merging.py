"""Time and peak memory of merging 100 frames of ViT-L/14 (10 segments x 2,560 tokens x 1,024) to 300 tokens.

Compares `merge_tokens` with a straightforward merging at full width: at every step the tokens' heads are averaged,
compared, and the full-width tokens are merged by a weighted average. Each runs in a process of its own, warmed up.
Prints both and their ratios; exits with 1 if the results differ.

    python benchmarks/token_merging.py [--repeats 5] [--threads 2]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

SEGMENTS, TOKENS, WIDTH, HEADS, NUM_TOKENS = 10, 2560, 1024, 16, 30


def merge_at_full_width(x, num_tokens: int, num_heads: int):
    """ToMe step by step, as one writes it down: `(S, T, d)` -> `(S, M, d)`."""
    import torch

    from longvlm.modeling_longvlm.token_merging import derive_schedule

    size = torch.ones_like(x[..., :1])
    for r in derive_schedule(x.shape[1], num_tokens):
        metric = x.unflatten(-1, (num_heads, -1)).mean(-2)
        metric = metric / metric.norm(dim=-1, keepdim=True)
        scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
        best, partner = scores.max(-1)
        ranking = best.argsort(dim=-1, descending=True)[..., None]
        merging, staying = ranking[:, :r], ranking[:, r:]
        partner = partner[..., None].gather(1, merging)

        def merge(values, merging=merging, staying=staying, partner=partner):
            first, second, width = values[:, ::2], values[:, 1::2], values.shape[-1]
            stays = first.gather(1, staying.expand(-1, -1, width))
            moves = first.gather(1, merging.expand(-1, -1, width))
            return torch.cat([stays, second.scatter_add(1, partner.expand(-1, -1, width), moves)], dim=1)

        x, size = merge(x * size), merge(size)
        x = x / size
    return x


def measure(way: str, repeats: int, threads: int) -> dict:
    """Median seconds and peak memory beyond the input, of one way, in this process."""
    import torch

    from longvlm.modeling_longvlm.token_merging import merge_tokens

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    # Neighbouring frames look alike: a slow drift plus noise.
    drift = torch.randn(SEGMENTS, 1, 256, WIDTH) + 0.1 * torch.randn(SEGMENTS, 10, 256, WIDTH).cumsum(1)
    x = (drift + 0.3 * torch.randn_like(drift)).flatten(1, 2)
    del drift
    run = {
        "merge_tokens": lambda: merge_tokens(x, NUM_TOKENS, num_heads=HEADS),
        "full width": lambda: merge_at_full_width(x, NUM_TOKENS, HEADS),
    }[way]
    with torch.inference_mode():
        result = run()
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        before = _reset_peak()
        run()
        extra = _peak() - before
    return {"seconds": sorted(seconds)[repeats // 2], "extra_mib": extra, "result": result.double().flatten().tolist()}


def _memory(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise OSError(f"This system does not report {field}; run the benchmark on Linux.")


def _reset_peak() -> float:
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _peak() -> float:
    return _memory("VmHWM")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        json.dump(measure(args.way, args.repeats, args.threads), sys.stdout)
        return 0

    rows = {}
    for way in ("full width", "merge_tokens"):
        command = [sys.executable, __file__, "--way", way, "--repeats", str(args.repeats)]
        # Every large tensor in a mapping of its own, so that freed memory does not hide what a later step needs.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(
            [*command, "--threads", str(args.threads)], capture_output=True, env=environment, text=True, check=True
        )
        rows[way] = json.loads(done.stdout)
    slow, fast = rows["full width"], rows["merge_tokens"]
    difference = max(abs(a - b) for a, b in zip(slow["result"], fast["result"], strict=True))

    print(f"100 frames of ViT-L/14, 10 segments x 2,560 -> {NUM_TOKENS} tokens, float32, {args.threads} CPU threads")
    for way, row in rows.items():
        print(f"  {way:13} {row['seconds'] * 1000:8.0f} ms   {row['extra_mib']:6.0f} MiB beyond the input")
    print(
        f"  time ratio    {slow['seconds'] / fast['seconds']:8.2f} x   memory ratio "
        f"{slow['extra_mib'] / fast['extra_mib']:.2f} x   largest difference {difference:.1e}"
    )
    return int(difference > 1e-4)


if __name__ == "__main__":
    sys.exit(main())
