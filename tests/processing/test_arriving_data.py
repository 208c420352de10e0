"""Videos from web addresses, pipes and file objects: limited in bytes and time, and nothing stays behind."""

import gzip
import io
import multiprocessing
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest

from longvlm.processing.video_decoding import VideoDecodeError, decode_video, probe_video
from longvlm.processing.video_processing_longvlm import LongVLMVideoProcessor
from longvlm.processing.video_sources import open_source
from tests.helpers.video_files import read_number, write_video
from tests.helpers.web_server import serve

FRAMES = 20


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return Path(write_video(tmp_path_factory.mktemp("film") / "film.mkv", FRAMES))


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path, monkeypatch):
    """Where temporary files would be: nothing may be there after, or during, a test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert os.listdir(folder) == []


def numbers(decoded):
    return [read_number(frame) for frame in decoded.frames]


def drip(answer, part=b"x" * 20_000, pause=0.01):
    while True:
        answer.wfile.write(part)
        answer.wfile.flush()
        time.sleep(pause)


def endless(answer):
    answer.head({})
    drip(answer)


def endless_head(answer):
    answer.wfile.write(b"HTTP/1.1 200 OK\r\n")
    drip(answer, b"X: y\r\n", 0.05)


def bomb(answer):
    answer.send(gzip.compress(bytes(50 << 20), 1), Content_Encoding="gzip")


def announced(answer):
    answer.head({"Content-Length": str(9 << 40)})


def silent(answer):
    time.sleep(5)


# --- limits ---


@pytest.mark.parametrize("answer", [endless, bomb, announced])
def test_a_download_of_too_many_bytes_ends(answer, monkeypatch):
    with serve({"/film.mp4": answer}) as server:
        url = server.url + "/film.mp4"
        reason = r"more than the limit of 100,000; raise `max_download_bytes` or .* LONGVLM_MAX_DOWNLOAD_BYTES$"
        with pytest.raises(VideoDecodeError, match=reason) as caught:
            open_source(url, max_download_bytes=100_000)
        assert str(caught.value).startswith(url)
        monkeypatch.setenv("LONGVLM_MAX_DOWNLOAD_BYTES", "100000")
        for read in (decode_video, probe_video, LongVLMVideoProcessor(num_frames=2)):
            with pytest.raises(VideoDecodeError, match=reason):
                read(url)


def test_without_limits_of_ones_own_an_absurd_size_is_refused():
    with serve({"/film.mp4": announced}) as server:
        with pytest.raises(
            VideoDecodeError, match=r"9,895,604,649,984 bytes are more than the limit of 8,589,934,592"
        ):
            open_source(server.url + "/film.mp4")


@pytest.mark.parametrize("answer", [endless, endless_head, silent])
def test_a_download_that_takes_too_long_ends(answer, monkeypatch):
    with serve({"/film.mp4": answer}) as server:
        reason = "not complete after 0.3 seconds .*raise `max_download_seconds` or .* LONGVLM_MAX_DOWNLOAD_SECONDS$"
        start = time.monotonic()
        with pytest.raises(VideoDecodeError, match=reason):
            open_source(server.url + "/film.mp4", max_download_seconds=0.3)
        monkeypatch.setenv("LONGVLM_MAX_DOWNLOAD_SECONDS", "0.3")
        with pytest.raises(VideoDecodeError, match=reason):
            decode_video(server.url + "/film.mp4")
        assert time.monotonic() - start < 4


def test_an_option_goes_before_the_environment(film, monkeypatch):
    monkeypatch.setenv("LONGVLM_MAX_DOWNLOAD_BYTES", "10")
    with serve({"/film.mkv": lambda answer: answer.send(film.read_bytes())}) as server:
        with open_source(server.url + "/film.mkv", max_download_bytes=10**6) as source:
            assert numbers(decode_video(source)) == list(range(FRAMES))


@pytest.mark.parametrize("value", ["much", "0", "-1", "nan", "inf"])
def test_a_limit_is_a_number_above_zero(value, monkeypatch):
    with pytest.raises(ValueError, match=r"`max_download_seconds` .*must be a number above 0"):
        open_source("http://127.0.0.1:9/a.mp4", max_download_seconds=value)
    monkeypatch.setenv("LONGVLM_MAX_DOWNLOAD_BYTES", value)
    with pytest.raises(ValueError, match=r"LONGVLM_MAX_DOWNLOAD_BYTES .*must be a number above 0"):
        open_source("http://127.0.0.1:9/a.mp4")


# --- where addresses lead ---


@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1/a.mp4", "data:video/mp4;base64,AAAA"])
def test_a_redirect_leads_only_to_the_web(target):
    with serve({"/film.mp4": lambda answer: answer.redirect(target)}) as server:
        with pytest.raises(
            VideoDecodeError, match=r"leads to .*; only http and https are followed|cannot be downloaded"
        ) as caught:
            open_source(server.url + "/film.mp4")
        assert "\n" not in str(caught.value)


def test_a_redirect_to_the_web_is_followed_but_not_for_ever(film):
    answers = {
        "/old": lambda answer: answer.redirect("/new.mkv"),
        "/new.mkv": lambda answer: answer.send(film.read_bytes()),
        "/loop": lambda answer: answer.redirect("/loop"),
    }
    with serve(answers) as server:
        assert len(decode_video(server.url + "/old").frames) == FRAMES
        with pytest.raises(VideoDecodeError, match="more than 10 redirects"):
            decode_video(server.url + "/loop")


def test_a_public_address_does_not_lead_into_a_private_network(film, monkeypatch):
    """The name that is asked for counts as public here; its server runs on this machine."""
    real = socket.getaddrinfo

    def lookup(host, port, *arguments, **options):
        if host == "public.example" and port is None:  # the check, not the connection
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("8.8.8.8", 0))]
        return real("127.0.0.1" if host == "public.example" else host, port, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with serve({"/secret": lambda answer: answer.send(film.read_bytes())}) as inner:
        with serve({"/film.mp4": lambda answer: answer.redirect(inner.url + "/secret")}) as outer:
            url = outer.url.replace("127.0.0.1", "public.example") + "/film.mp4"
            with pytest.raises(VideoDecodeError, match=r"leads to .*/secret, which is in a private network"):
                open_source(url)
            assert outer.asked == ["/film.mp4"] and inner.asked == []
            assert len(decode_video(outer.url + "/film.mp4").frames) == FRAMES  # from here to here


def test_a_file_url_that_names_another_machine_is_refused():
    with pytest.raises(VideoDecodeError, match="three slashes"):
        open_source("file://elsewhere/etc/hostname")


def test_a_password_in_an_address_is_used_but_not_told():
    heads = []
    with serve(
        {"/film.mp4": lambda answer: (heads.append(answer.headers["Authorization"]), answer.send(b"no"))}
    ) as server:
        with pytest.raises(VideoDecodeError) as caught:
            decode_video(server.url.replace("//", "//me:secret@") + "/film.mp4")
    assert "secret" not in str(caught.value) and f"{server.url}/film.mp4: not a video file" in str(caught.value)
    assert heads == ["Basic bWU6c2VjcmV0"]


# --- progress, and its end ---


@pytest.mark.parametrize("says_length", [True, False])
def test_progress_counts_bytes(film, temporary_folder, says_length):
    content, seen = film.read_bytes(), []

    def slowly(answer):
        answer.head({"Content-Length": str(len(content))} if says_length else {})
        for start in range(0, len(content), len(content) // 4 + 1):
            answer.wfile.write(content[start : start + len(content) // 4 + 1])
            answer.wfile.flush()
            time.sleep(0.2)

    def progress(stage, done, total):
        if stage == "download":
            seen.append((done, total))
        assert os.listdir(temporary_folder) == []

    with serve({"/film.mkv": slowly}) as server:
        assert numbers(decode_video(server.url + "/film.mkv", progress=progress)) == list(range(FRAMES))
    done = [entry[0] for entry in seen]
    assert len(set(done)) >= 3 and done == sorted(done)
    assert {total for done, total in seen if done} == {len(content) if says_length else 0}
    assert not says_length or done[-1] == len(content)


def test_what_progress_raises_ends_the_download():
    class Stopped(Exception):
        pass

    def stop(stage, done, total):
        raise Stopped

    with serve({"/film.mp4": endless}) as server, pytest.raises(Stopped):
        open_source(server.url + "/film.mp4", progress=stop)


def open_until_killed(address):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whatever this fork has inherited
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    open_source(address)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_process_leaves_no_file(temporary_folder):
    signals = (signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
    with serve({f"/{int(number)}": endless for number in signals}) as server:
        addresses = [f"{server.url}/{int(number)}" for number in signals]
        fork = multiprocessing.get_context("fork")  # starts at once
        processes = [fork.Process(target=open_until_killed, args=(address,), daemon=True) for address in addresses]
        try:
            for process in processes:
                process.start()
            deadline = time.monotonic() + 60
            while len(server.asked) < len(signals) and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(0.2)  # bytes are arriving
            for number, process in zip(signals, processes, strict=True):
                assert process.is_alive()
                os.kill(process.pid, number)
                process.join(60)
                assert process.exitcode == -number
        finally:
            for process in processes:
                process.kill()  # one that is left would be waited for when the tests end
    assert os.listdir(temporary_folder) == []


# --- pipes and file objects ---


def test_a_pipe_of_the_shell_is_a_video(film):
    reading, writing = os.pipe()
    writer = threading.Thread(target=lambda: (os.write(writing, film.read_bytes()), os.close(writing)))
    writer.start()
    try:
        assert numbers(decode_video(f"/dev/fd/{reading}")) == list(range(FRAMES))
    finally:
        writer.join()
        os.close(reading)


def test_a_named_pipe_is_a_video_whoever_comes_first(film, tmp_path):
    pipe = tmp_path / "pipe.mp4"
    os.mkfifo(pipe)
    for wait in (0.0, 0.3):
        writer = threading.Thread(target=lambda wait=wait: (time.sleep(wait), pipe.write_bytes(film.read_bytes())))
        writer.start()
        assert numbers(decode_video(pipe)) == list(range(FRAMES))
        writer.join()


def test_a_pipe_that_stays_silent_or_never_ends_is_given_up(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(VideoDecodeError, match=r"pipe: not complete after 0.2 seconds \(0 bytes arrived\)"):
        open_source(pipe, max_download_seconds=0.2)
    endless = tmp_path / "endless"  # another one: the reader of the first may not have left yet
    os.mkfifo(endless)
    yes = subprocess.Popen(["sh", "-c", f"exec yes > {endless}"])
    try:
        with pytest.raises(VideoDecodeError, match="more than the limit of 1,000,000"):
            open_source(endless, max_download_bytes=10**6, max_download_seconds=60)
    finally:
        yes.kill()
        yes.wait()


def test_an_empty_pipe_and_a_device_are_refused_by_name():
    reading, writing = os.pipe()
    os.close(writing)
    with pytest.raises(VideoDecodeError, match=f"/dev/fd/{reading}: the file is empty"):
        open_source(f"/dev/fd/{reading}")
    os.close(reading)
    for device in ("/dev/zero", "/dev/null"):
        with pytest.raises(VideoDecodeError, match=f"{device}: neither a file nor a folder nor a pipe"):
            open_source(device)


@pytest.mark.parametrize("as_name", [True, False])
def test_standard_input_is_a_video(film, as_name):
    kept = os.dup(0)
    try:
        with subprocess.Popen(["cat", str(film)], stdout=subprocess.PIPE) as cat:
            os.dup2(cat.stdout.fileno(), 0)
            video = "/dev/stdin" if as_name else open(0, "rb", closefd=False)
            assert numbers(decode_video(video)) == list(range(FRAMES))
    finally:
        os.dup2(kept, 0)
        os.close(kept)


class Unseekable(io.RawIOBase):
    """What arrives in small pieces, and sometimes not yet."""

    def __init__(self, content):
        self.rest, self.asked = content, 0

    def readable(self):
        return True

    def read(self, size=-1):
        self.asked += 1
        if self.asked % 5 == 3:
            return None
        piece, self.rest = self.rest[:5000], self.rest[5000:]
        return piece


def test_a_file_object_that_cannot_seek_is_read_to_its_end(film):
    assert numbers(decode_video(Unseekable(film.read_bytes()))) == list(range(FRAMES))
    with pytest.raises(VideoDecodeError, match="more than the limit of 7,000"):
        open_source(Unseekable(film.read_bytes() * 9), max_download_bytes=7000)


def test_a_source_can_be_read_often_and_by_several_readers(film):
    with serve({"/film.mkv": lambda answer: answer.send(film.read_bytes())}) as server:
        with open_source(server.url + "/film.mkv") as source:
            first = decode_video(source, num_workers=2)
            again = decode_video(source, lambda metadata: [3, 1])
            assert numbers(first) == list(range(FRAMES)) and numbers(again) == [3, 1]
            assert source.digest() == open_source(film).digest()
        assert server.asked == ["/film.mkv"]
