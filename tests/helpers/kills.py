"""Kills a job at random moments and lets it go on, as often as asked; run as a script, for one kind of job:

    python -m tests.helpers.kills KIND FOLDER KILLS RUNS

KILLS are spread over RUNS, each of which is resumed until it is whole. The job runs in forks of this process, which
has imported everything and computed nothing: so a kill hits the work, and not the seconds of importing torch. After
each kill, what lies there must be whole or not be taken for whole; at the end it must equal, byte for byte, what a
run makes that nobody killed.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import yaml

import longvlm
from longvlm.conversion.assemble import assemble
from longvlm.conversion.llava import convert_llava
from longvlm.conversion.original import convert_original
from longvlm.conversion.original_features import convert_features
from longvlm.conversion.to_original import convert_to_original
from longvlm.features.extract import extract_features
from longvlm.features.store import FeatureReader
from longvlm.publishing import checks
from longvlm.publishing.publish import publish
from longvlm.training.arguments import parse_arguments
from longvlm.training.train import train
from longvlm.training.trainer import last_whole_checkpoint
from tests.helpers.hub_stub import HubStub
from tests.helpers.paths import FIXTURES
from tests.helpers.tiny_models import save_tiny_llm, save_tiny_longvlm, tiny_vision_config
from tests.helpers.video_files import write_video

ORIGINAL = FIXTURES / "original_checkpoint"
METHOD = {"frames_per_segment": 4, "tokens_per_segment": 6}


class Job:
    """
    One kind of work. Subclasses make its sources, do it, and look at what there is.

    Args:
        folder: for the sources.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def prepare(self) -> None:
        """Makes the sources. Like `run`, in a fork: this process must not compute."""

    def run(self, out: Path) -> None:
        raise NotImplementedError

    def look(self, out: Path, whole) -> None:
        """After a kill: what can be seen is part of `whole`, or nothing."""
        raise NotImplementedError

    def result(self, out: Path):
        """All that matters of a finished run, to be compared."""
        return hashes(out)

    def start(self, out: Path) -> None:
        """Before the first run into `out`."""


def hashes(folder: Path) -> dict[str, str]:
    """Name -> digest of all files in a folder, hidden ones included."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: hashlib.blake2b(content_of(path)).hexdigest() for name, path in files.items()}


def content_of(file: Path) -> bytes:
    """The bytes of a file; safetensors writes the metadata in its header in any order, so that is sorted."""
    data = file.read_bytes()
    if file.suffix != ".safetensors":
        return data
    end = 8 + int.from_bytes(data[:8], "little")
    return json.dumps(json.loads(data[8:end]), sort_keys=True).encode() + data[end:]


def features_in(folder: Path) -> dict[str, list]:
    """Everything that a reader gives, whatever the shards are."""
    return {
        video: [
            one.local_features.tolist(),
            one.all_global_features.tolist(),
            one.num_frames,
            one.duration,
            None if one.segment_seconds is None else one.segment_seconds.tolist(),
        ]
        for video, one in FeatureReader(folder).items()
    }


class FolderJob(Job):
    """Work whose output is a folder that appears whole. Every second run replaces an older one."""

    OLD = "an older one"

    def start(self, out):
        if int(out.name.rsplit("-", 1)[-1]) % 2:
            out.mkdir()
            (out / "old.txt").write_text(self.OLD)

    def look(self, out, whole):
        old = hashlib.blake2b(self.OLD.encode()).hexdigest()
        if out.exists():
            assert hashes(out) in (whole, {"old.txt": old}), "a folder that is half written"
        elif int(out.name.rsplit("-", 1)[-1]) % 2:
            # Between two renames: the next run puts it back.
            (kept,) = out.parent.glob(f".{out.name}.previous-*")
            assert hashes(kept) == {"old.txt": old}


class Assemble(FolderJob):
    def prepare(self):
        from transformers import CLIPVisionModel

        CLIPVisionModel(tiny_vision_config()).save_pretrained(self.folder / "clip")
        save_tiny_llm(self.folder / "llm")

    def run(self, out):
        sources = self.folder / "clip", self.folder / "llm"
        assemble(*sources, out, overwrite=True, num_global_layers=2, **METHOD)


class Llava(FolderJob):
    def prepare(self):
        from tests.conversion.test_convert_llava import transformers_llava

        transformers_llava(self.folder / "llava")

    def run(self, out):
        convert_llava(self.folder / "llava", out, overwrite=True, **METHOD)


class Original(FolderJob):
    def prepare(self):
        from tests.conversion.test_convert_original import save_vision

        save_vision(self.folder / "vision")

    def run(self, out):
        sources = {"delta": ORIGINAL / "delta", "projector": ORIGINAL / "mm_projector.bin"}
        sources |= {"vision": self.folder / "vision", "max_shard_bytes": 20_000}
        convert_original(ORIGINAL / "base", out, **sources, overwrite=True, forward_check=False)


class OpenClip(FolderJob):
    def prepare(self):
        self._register()
        import open_clip

        torch.save(open_clip.create_model("tiny-for-kills").state_dict(), self.folder / "weights.pt")

    def run(self, out):
        from longvlm.conversion.openclip_vision import convert_open_clip

        self._register()
        convert_open_clip("tiny-for-kills", out, pretrained=self.folder / "weights.pt", overwrite=True)

    def _register(self):
        import open_clip

        vision = {"layers": 2, "image_size": 64, "patch_size": 16, "width": 64, "head_width": 16}
        text = {"layers": 1, "width": 64, "heads": 1, "vocab_size": 99, "context_length": 8}
        config = {"embed_dim": 48, "vision_cfg": vision, "text_cfg": text}
        (self.folder / "tiny-for-kills.json").write_text(json.dumps(config))
        open_clip.add_model_config(self.folder / "tiny-for-kills.json")


class ToOriginal(FolderJob):
    def prepare(self):
        original = Original(self.folder)
        original.prepare()
        original.run(self.folder / "checkpoint")
        features = ORIGINAL / "features"
        convert_features(features / "local", features / "memory", self.folder / "features", num_global_layers=5)

    def run(self, out):
        convert_to_original(self.folder / "checkpoint", out, features=self.folder / "features", overwrite=True)


class FeaturesJob(Job):
    """Work whose output is a folder of features, which grows."""

    def look(self, out, whole):
        if (out / "index.json").exists():
            found = features_in(out)
            assert all(whole[video] == value for video, value in found.items()), "other features"

    def result(self, out):
        left = {path.name for path in out.iterdir() if path.suffix != ".safetensors"}
        assert left <= {"index.json", ".lock", "failed.jsonl"}, left
        return features_in(out)


class Features(FeaturesJob):
    def prepare(self):
        from tests.conversion.test_convert_features import write_features

        write_features(self.folder, 60, rows=30, width=64)

    def run(self, out):
        convert_features(self.folder / "local", self.folder / "memory", out, shard_bytes=20_000)


class Extract(FeaturesJob):
    def prepare(self):
        (self.folder / "videos").mkdir()
        for number in range(8):
            write_video(self.folder / "videos" / f"v_{number}.mp4", 10 + number)
        (self.folder / "videos" / "broken.mp4").write_bytes(b"no video")
        save_tiny_longvlm(self.folder / "model")

    def run(self, out):
        engine = longvlm.load(self.folder / "model", device="cpu")
        parts = {"model": engine.model, "processor": engine.processor}
        extract_features([self.folder / "videos"], out, **parts, shard_bytes=5000)


class Train(Job):
    STEPS = 30

    def prepare(self):
        extract = Extract(self.folder)
        extract.prepare()
        extract.run(self.folder / "features")
        rows = [{"video": f"v_{n % 8}", "question": "Who?" * (1 + n % 3), "answer": "A man."} for n in range(11)]
        (self.folder / "rows.json").write_text(json.dumps(rows))
        options = {"model": "model", "train_data": ["rows.json"], "features": ["features"]}
        options = {
            k: [str(self.folder / v[0])] if isinstance(v, list) else str(self.folder / v) for k, v in options.items()
        }
        options |= {"max_steps": self.STEPS, "save_steps": 5, "logging_steps": 1, "report_to": "none"}
        options |= {"per_device_train_batch_size": 2, "learning_rate": 5e-3, "disable_tqdm": True, "use_cpu": True}
        (self.folder / "train.yaml").write_text(yaml.safe_dump(options | {"resume_from_checkpoint": "auto"}))

    def run(self, out):
        train(*parse_arguments([str(self.folder / "train.yaml"), "--output_dir", str(out)]))

    def look(self, out, whole):
        from safetensors import safe_open

        last = last_whole_checkpoint(out)
        if last is not None:
            with safe_open(Path(last) / "model.safetensors", "pt") as opened:
                assert opened.keys()
            assert json.loads((Path(last) / "trainer_state.json").read_text())["global_step"] % 5 == 0

    def result(self, out):
        history = json.loads((out / "trainer_state.json").read_text())["log_history"]
        losses = [entry["loss"] for entry in history if "loss" in entry]
        assert len(losses) == self.STEPS
        weights = {
            name: hash for name, hash in hashes(out).items() if "/" not in name and name.endswith("safetensors")
        }
        assert weights
        return {"losses": losses, **weights}


class Publish(Job):
    """To a Hub of this process; each `out` is a repository of its own."""

    def __init__(self, folder):
        super().__init__(folder)
        import huggingface_hub.constants as hub

        checks.loading_problems = lambda folder: []
        self.hub = HubStub().__enter__()
        self.hub.fail = lambda method, path: time.sleep(0.02)  # as over a network
        hub.ENDPOINT, hub.HF_HUB_OFFLINE, hub.HF_HUB_DISABLE_XET = self.hub.url, False, True
        os.environ["HF_TOKEN"] = HubStub.TOKEN

    def prepare(self):
        save_tiny_longvlm(self.folder / "model")

    def start(self, out):
        self.hub.repos.pop(f"me/{out.name}", None)
        self.hub.lfs.clear()  # else the weights would be there already

    def run(self, out):
        publish(self.folder / "model", f"me/{out.name}", license="mit", base_model=["me/llm"])

    def look(self, out, whole):
        time.sleep(0.2)  # the Hub may be about to answer
        repository = self.hub.repos.get(f"me/{out.name}")
        if repository is not None:
            assert len(repository.commits) <= 1
            assert self._files(out) == (whole if repository.commits else {}), "half of a checkpoint"

    def result(self, out):
        assert len(self.hub.repos[f"me/{out.name}"].commits) <= 2  # a killed run may have finished, unheard
        return self._files(out)

    def _files(self, out):
        files = dict(self.hub.repos[f"me/{out.name}"].branches["main"])
        files.pop(".gitattributes", None)
        # The card names its repository.
        return {name: data.decode("latin-1").replace(out.name, "NAME") for name, data in files.items()}


JOBS: dict[str, type[Job]] = {
    "assemble": Assemble,
    "convert llava": Llava,
    "convert original": Original,
    "convert open-clip": OpenClip,
    "convert to-original": ToOriginal,
    "convert features": Features,
    "extract": Extract,
    "train": Train,
    "publish": Publish,
}


def fork(work: Callable[[], None], log: Path) -> int:
    """Starts `work` in a fork, in a group of processes of its own; returns the id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            work()
            code = 0
    except BaseException:
        log.write_text(traceback.format_exc())
    finally:
        os._exit(code)


def finish(work: Callable[[], None], log: Path) -> float:
    """Runs `work` to its end; returns the seconds that it took."""
    begun = time.perf_counter()
    _, status = os.waitpid(fork(work, log), 0)
    assert status == 0, log.read_text()[-3000:]
    return time.perf_counter() - begun


def kill(work: Callable[[], None], log: Path, seconds: float) -> bool:
    """Runs `work` and kills it after so many seconds; whether it was still at work."""
    pid = fork(work, log)
    time.sleep(seconds)
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # it is not yet a group, or has ended
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, log.read_text()[-3000:]
    return os.WIFSIGNALED(status)


def try_kills(kind: str, folder: Path, kills: int, runs: int, seed: int) -> int:
    """Returns how many kills there were."""
    dice, log = random.Random(seed), folder / "log.txt"
    (folder / "sources").mkdir(parents=True)
    job = JOBS[kind](folder / "sources")
    finish(job.prepare, log)
    finish(partial(job.run, folder / "whole-0"), log)
    whole, before = job.result(folder / "whole-0"), set(os.listdir(folder))
    seconds = finish(partial(job.run, folder / "again-0"), log)  # the first one warms up caches
    assert job.result(folder / "again-0") == whole, "not the same twice, even without a kill"
    shutil.rmtree(folder / "again-0", ignore_errors=True)
    killed = 0
    for number in range(runs):
        out, wanted = folder / f"killed-{number}", kills * (number + 1) // runs
        work = partial(job.run, out)
        job.start(out)
        while killed < wanted:
            if kill(work, log, dice.uniform(0, seconds)):
                killed += 1
                job.look(out, whole)
            else:  # it was faster: from the beginning
                shutil.rmtree(out, ignore_errors=True)
                job.start(out)
        finish(work, log)
        assert job.result(out) == whole, f"run {number} is another than without kills"
        assert {name for name in os.listdir(folder) if name.startswith(".")} <= before, "leftovers"
    return killed


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, folder, kills, runs, seed = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:6])
    print(try_kills(kind, folder, kills, runs, seed))
