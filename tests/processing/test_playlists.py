"""HLS playlists, where they are allowed: whole videos put together from their pieces, and nothing else."""

import os
import shutil
from pathlib import Path

import pytest

from longvlm.processing.playlists import parse_playlist
from longvlm.processing.video_decoding import VideoDecodeError, decode_video
from longvlm.processing.video_sources import open_source
from tests.helpers.video_files import read_number, write_video
from tests.helpers.web_server import serve

FRAMES = 60
PLAYLIST = {"file", "playlist"}
KINDS = {
    "pieces": {},
    "pieces of one file": {"hls_flags": "single_file"},
    "fragmented mp4": {"hls_segment_type": "fmp4"},
    "fragmented mp4 in one file": {"hls_segment_type": "fmp4", "hls_flags": "single_file"},
}


@pytest.fixture(scope="module")
def playlists(tmp_path_factory):
    """A folder with a playlist for each kind, each in a folder of its own."""
    top, here = tmp_path_factory.mktemp("playlists"), os.getcwd()
    for kind, options in KINDS.items():
        folder = top / kind.replace(" ", "_")
        folder.mkdir()
        os.chdir(folder)  # FFmpeg writes the pieces here
        try:
            hls = {"hls_time": "0.5", "hls_list_size": "0", "hls_playlist_type": "vod", **options}
            write_video("film.m3u8", FRAMES, gop=12, container_options=hls)
        finally:
            os.chdir(here)
    return top


def numbers(video, **options):
    with open_source(video, **options) as source:
        return [read_number(frame) for frame in decode_video(source).frames]


def files_of(folder: Path):
    """Answers of a server that has this folder."""
    return {
        f"/{path.relative_to(folder).as_posix()}": lambda answer, path=path: answer.send(path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_playlist_is_its_video_on_disk_and_on_the_web(playlists, kind):
    folder = playlists / kind.replace(" ", "_")
    assert ("EXT-X-BYTERANGE" in (folder / "film.m3u8").read_text()) == ("one" in kind)
    assert numbers(folder / "film.m3u8", allow=PLAYLIST) == list(range(FRAMES))
    with serve(files_of(folder)) as server:
        seen = []
        url = server.url + "/film.m3u8"
        shown = numbers(url, allow=PLAYLIST, progress=lambda *step: seen.append(step))
        assert shown == list(range(FRAMES))
        assert len(set(server.asked)) == len(list(folder.iterdir()))
        assert all(stage == "download" for stage, done, total in seen)
        with pytest.raises(VideoDecodeError, match=r'a playlist .*not opened.*`allow` "playlist"'):
            open_source_and_read(url)
        with pytest.raises(VideoDecodeError, match=r"film\.m3u8: .* bytes are more than the limit of 4,000"):
            open_source(url, allow=PLAYLIST, max_download_bytes=4000)


def open_source_and_read(video):
    return decode_video(video)


def master(*variants):
    lines = [f"#EXT-X-STREAM-INF:BANDWIDTH={rate},RESOLUTION=320x64\n{name}\n" for rate, name in variants]
    return "#EXTM3U\n" + "".join(lines)


def test_of_several_variants_the_best_is_taken(playlists, tmp_path):
    shutil.copytree(playlists / "pieces", tmp_path / "high")
    (tmp_path / "low").mkdir()
    (tmp_path / "low" / "film.m3u8").write_text("never read")
    top = tmp_path / "top.m3u8"
    top.write_text(master((100, "low/film.m3u8"), (900, "high/film.m3u8"), (200, "low/film.m3u8")))
    assert numbers(top, allow=PLAYLIST) == list(range(FRAMES))
    answers = files_of(tmp_path)
    answers["/moved.m3u8"] = lambda answer: answer.redirect("/top.m3u8")
    with serve(answers) as server:
        assert numbers(server.url + "/moved.m3u8", allow=PLAYLIST) == list(range(FRAMES))
        assert not any("low" in path for path in server.asked)
    top.write_text(master((1, "top.m3u8")))
    with pytest.raises(VideoDecodeError, match="playlists of playlists"):
        open_source(top, allow=PLAYLIST)


def vod(*names, extra=""):
    return "#EXTM3U\n" + extra + "".join(f"#EXTINF:1,\n{name}\n" for name in names) + "#EXT-X-ENDLIST\n"


@pytest.mark.parametrize("way", ["relative", "absolute", "file URL", "link", "web", "folder", "missing"])
def test_a_playlist_on_disk_leads_only_to_files_in_its_folder(playlists, tmp_path, way):
    (tmp_path / "inside" / "folder.ts").mkdir(parents=True)
    secret = tmp_path / "secret.ts"
    secret.write_bytes((playlists / "pieces" / "film0.ts").read_bytes())
    (tmp_path / "inside" / "link.ts").symlink_to(secret)
    with serve({"/secret.ts": lambda answer: answer.send(secret.read_bytes())}) as server:
        name = {
            "relative": "../secret.ts",
            "absolute": str(secret),
            "file URL": secret.as_uri(),
            "link": "link.ts",
            "web": server.url + "/secret.ts",
            "folder": "folder.ts",
            "missing": "missing.ts",
        }[way]
        playlist = tmp_path / "inside" / "film.m3u8"
        playlist.write_text(vod(name))
        with pytest.raises(
            VideoDecodeError, match=r"film\.m3u8: the playlist names .*, which is no file in its folder"
        ):
            open_source(playlist, allow=PLAYLIST)
        playlist.write_text(master((1, name)))
        with pytest.raises(VideoDecodeError, match="which is no file in its folder"):
            open_source(playlist, allow=PLAYLIST)
        assert server.asked == []


def test_a_playlist_on_the_web_leads_only_to_the_web(tmp_path):
    secret = Path(write_video(tmp_path / "secret.ts", 5))
    for name in (secret.as_uri(), "ftp://127.0.0.1/a.ts", "data:video/mp2t;base64,AAAA"):
        with serve({"/film.m3u8": lambda answer, name=name: answer.send(vod(name).encode())}) as server:
            with pytest.raises(VideoDecodeError, match=r"film\.m3u8: .*(only http and https|cannot be downloaded)"):
                open_source(server.url + "/film.m3u8", allow=PLAYLIST)
    with serve({"/film.m3u8": lambda answer: answer.send(vod(str(secret)).encode())}) as server:
        with pytest.raises(VideoDecodeError, match=r"secret\.ts cannot be downloaded \(the server answered 404\)"):
            open_source(server.url + "/film.m3u8", allow=PLAYLIST)


def test_a_playlist_of_a_public_server_does_not_lead_into_a_private_network(tmp_path, monkeypatch):
    monkeypatch.setattr("longvlm.processing.downloads.is_private", lambda host: host == "localhost")
    piece = Path(write_video(tmp_path / "piece.ts", 5)).read_bytes()
    with serve({"/secret.ts": lambda answer: answer.send(piece)}) as inner:
        name = f"http://localhost:{inner.server_port}/secret.ts"
        with serve({"/film.m3u8": lambda answer: answer.send(vod(name).encode())}) as outer:
            with pytest.raises(VideoDecodeError, match=r"leads to http://localhost.*, which is in a private network"):
                open_source(outer.url + "/film.m3u8", allow=PLAYLIST)
        assert inner.asked == []


def test_what_cannot_be_put_together_says_why(tmp_path):
    for text, reason in {
        vod("a.ts").replace("#EXT-X-ENDLIST\n", ""): "without an end",
        vod(): "without pieces",
        vod("a.ts", extra='#EXT-X-KEY:METHOD=AES-128,URI="key"\n'): "encrypted",
        vod("a.mp4", extra='#EXT-X-MAP:URI="1"\n') + vod("b.mp4", extra='#EXT-X-MAP:URI="2"\n'): "several videos",
        vod("a.ts", extra="#EXT-X-BYTERANGE:many@0\n"): "'many' in the playlist is not a number",
        "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=x\na.m3u8\n": "'x' in the playlist is not a number",
    }.items():
        path = tmp_path / "film.m3u8"
        path.write_text(text)
        with pytest.raises(VideoDecodeError, match=rf"film\.m3u8: .*{reason}"):
            open_source(path, allow=PLAYLIST)


def test_byte_ranges_go_on_where_the_one_before_ended():
    ranges = "#EXTM3U\n#EXT-X-BYTERANGE:10@5\na\n#EXT-X-BYTERANGE:20\na\n#EXT-X-BYTERANGE:7\nb\nc\n#EXT-X-ENDLIST\n"
    assert parse_playlist(ranges, "film")[1] == [("a", 5, 10), ("a", 15, 20), ("b", 0, 7), ("c", 0, None)]


def test_bytes_are_no_playlist_whatever_is_allowed(playlists, monkeypatch):
    monkeypatch.chdir(playlists / "pieces")
    content = Path("film.m3u8").read_bytes()
    for video in (content, open("film.m3u8", "rb")):
        with open_source(video, allow=PLAYLIST) as source, pytest.raises(VideoDecodeError, match="a playlist"):
            decode_video(source)


def test_a_video_stays_a_video_where_playlists_are_allowed(tmp_path):
    assert numbers(write_video(tmp_path / "film.m3u8.mp4", 5), allow=PLAYLIST) == list(range(5))
