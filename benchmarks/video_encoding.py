"""Time of encoding 16 frames with ViT-L/14 in bfloat16, against the vision encoder's own forward pass.

Three ways, each timed in alternating pairs with the encoder's plain forward: `get_video_features` with and without
global tokens, and the plain way, which asks the encoder for all hidden states and picks out those that are needed.
Prints the medians of the pairs' ratios, 1.00 being the encoder alone; exits with 1 if the ways' features differ.

    python benchmarks/video_encoding.py [--repeats 7] [--threads 2] [--frames 16] [--json]
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from transformers import LlamaConfig

from longvlm import LongVLMConfig, LongVLMModel
from longvlm.modeling_longvlm.token_merging import merge_tokens

# What the ratios should stay below.
GOALS = {"with global tokens": 1.02, "without global tokens": 0.98}
# Some units in the last place of bfloat16, for values of about 1.
TOLERANCE = 0.05


def make_model() -> LongVLMModel:
    """CLIP ViT-L/14 and the projector of a 7B, untrained; one layer of LLM, which encoding does not touch."""
    text = LlamaConfig(
        vocab_size=100,
        hidden_size=4096,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return LongVLMModel(LongVLMConfig(text_config=text)).eval().to(torch.bfloat16)


def make_frames(frames: int) -> Tensor:
    """`(T, 3, 224, 224)` bfloat16: neighbours look alike, as in a video."""
    noise = torch.randn(frames, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    return (noise[:1] + 0.3 * noise).to(torch.bfloat16)


def encode_with_all_hidden_states(model: LongVLMModel, frames: Tensor) -> tuple[Tensor, Tensor]:
    """The method as one writes it down: local features `(L, d)` and global features `(E, d)`."""
    config = model.config
    hidden_states = model.vision_tower(frames, output_hidden_states=True).hidden_states
    patches = hidden_states[config.vision_feature_layer][:, 1:]  # (T, N, d)
    class_tokens = torch.stack([h[:, 0] for h in hidden_states[-config.num_global_layers :]])  # (E, T, d)
    local_features = [
        merge_tokens(segment.flatten(0, 1)[None], config.tokens_per_segment, num_heads=config.merge_num_heads)[0]
        for segment in patches.split(config.frames_per_segment)
    ]
    global_features = class_tokens.float().mean(1).to(frames.dtype)
    model.multi_modal_projector(torch.cat([global_features, *local_features]))
    return torch.cat(local_features), global_features


def time_pairs(way: Callable, plain: Callable, repeats: int) -> dict[str, float]:
    """Median seconds of both, and the median of the pairs' ratios; each pair runs in the other order."""

    def seconds(run: Callable) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    pairs = []
    for repeat in range(repeats):
        if repeat % 2:
            of_plain = seconds(plain)
            pairs.append((seconds(way), of_plain))
        else:
            pairs.append((seconds(way), seconds(plain)))
    return {
        "seconds": median(a for a, _ in pairs),
        "plain_seconds": median(b for _, b in pairs),
        "ratio": median(a / b for a, b in pairs),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--json", action="store_true", help="the numbers as one JSON object")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, frames = make_model(), make_frames(args.frames)

    def encode(placement: str):
        model.config.global_placement = placement
        return model.get_video_features(frames[None])

    ways = {
        "all hidden states": lambda: encode_with_all_hidden_states(model, frames),
        "with global tokens": lambda: encode("prefix"),
        "without global tokens": lambda: encode("none"),
    }
    with torch.inference_mode():
        local_features, global_features = ways["all hidden states"]()
        features = [ways["with global tokens"](), ways["without global tokens"]()]
        differences = [(one.local_features[0] - local_features).abs().max().item() for one in features]
        differences.append((features[0].global_features[0] - global_features).abs().max().item())
        rows = {name: time_pairs(way, lambda: model.vision_tower(frames), args.repeats) for name, way in ways.items()}

    if args.json:
        print(json.dumps({**rows, "difference": max(differences)}))
    else:
        print(
            f"{args.frames} frames of ViT-L/14, bfloat16, {args.threads} CPU threads, median of {args.repeats} pairs"
        )
        for name, row in rows.items():
            goal = f"   (goal: at most {GOALS[name]})" if name in GOALS else ""
            print(
                f"  {name:21} {row['seconds'] * 1000:6.0f} ms   encoder {row['plain_seconds'] * 1000:6.0f} ms   "
                f"ratio {row['ratio']:.3f}{goal}"
            )
        print(f"  largest difference between the ways {max(differences):.1e}")
    return int(max(differences) > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
