from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import fsspec
import pytest
import torch
from torch import Tensor

import lit_merge.checkpoint.remote as remote
from lit_merge.checkpoint import fingerprint, open_checkpoint, save_tensors
from lit_merge.errors import InputError
from lit_merge.expert import ExpertInfo, open_expert, write_expert
from lit_merge.location import RemotePath, is_inside, is_remote, locate
from lit_merge.upload import require_free_url, upload_folder

STATE = {
    "fc.weight": torch.randn(40, 50, generator=torch.Generator().manual_seed(0)),
    "fc.half": torch.arange(60.0).reshape(3, 4, 5).bfloat16(),
    "count": torch.tensor(7),
    "empty": torch.zeros(0, 3),
}


@pytest.fixture
def bucket() -> Iterator[str]:
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    yield "memory://bucket"
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def put(path: Path, url: str) -> str:
    fsspec.filesystem("memory").put(str(path), url, recursive=True)
    return url


@pytest.mark.parametrize(
    ("path", "remote"),
    [
        ("s3://bucket/x", True),
        ("s3:/bucket/x", True),  # what a Path makes of it
        (Path("gs://bucket/x"), True),
        ("simplecache::s3://bucket/x", True),
        (RemotePath("memory://x"), True),
        ("runs/svhn", False),
        ("/abs/x:y", False),
        ("C:\\runs", False),
        ("C:/runs", False),
        ("c:/runs", False),
        ("file:///tmp/x", False),
        (Path("a:b/c"), False),
    ],
)
def test_urls_are_told_from_paths(path: str | Path, remote: bool) -> None:
    assert is_remote(path) is remote


def test_a_location_keeps_what_was_named() -> None:
    assert locate("file:///tmp/x") == Path("/tmp/x")
    assert locate("runs/x") == Path("runs/x")
    for text in ("memory://a/b", "memory:/a/b/", Path("memory://a/b")):
        found = locate(text)
        assert isinstance(found, RemotePath)
        assert (str(found), found.name, str(found.parent)) == ("memory://a/b", "b", "memory://a")
        assert str(found / "c.json") == "memory://a/b/c.json"
        assert (found / "c.json").suffix == ".json"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket/x", "must have the package for s3:// installed; .*Run: pip install s3fs"),
        ("gs://bucket/x", "must have the package for gs:// installed; .*Run: pip install gcsfs"),
        ("nonsense://bucket/x", "a URL that fsspec knows; got nonsense://"),
        ("memory://nowhere", "memory://nowhere: must exist; got no such file or folder"),
    ],
)
def test_what_cannot_be_read_is_an_error(
    url: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("s3fs", "gcsfs"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(InputError, match=message):
        open_checkpoint(url)


def assert_same(url: str, path: Path) -> None:
    with open_checkpoint(url) as far, open_checkpoint(path) as near:
        assert far.infos == near.infos
        assert (far.source, dict(far.metadata)) == (near.source, dict(near.metadata))
        for name, info in near.infos.items():
            assert torch.equal(far.tensor(name), near.tensor(name))
            for start in range(0, info.numel, 333):
                stop = min(start + 333, info.numel)
                assert torch.equal(far.read(name, start, stop), near.read(name, start, stop))
        assert fingerprint(far) == fingerprint(near)


@pytest.mark.parametrize("block", [1, 100, 2**22])
def test_a_file_reads_as_its_copy_on_disk(
    tmp_path: Path, bucket: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if block == 1:
        monkeypatch.setattr(remote, "_KEPT", 10_000)
    monkeypatch.setattr(remote, "_BLOCK", max(block, 16))
    save_tensors(tmp_path / "model.safetensors", STATE, {"made": "here"})
    put(tmp_path / "model.safetensors", f"{bucket}/model.safetensors")
    assert_same(f"{bucket}/model.safetensors", tmp_path / "model.safetensors")
    assert_same(bucket, tmp_path)


def sharded(folder: Path) -> Path:
    folder.mkdir()
    names = list(STATE)
    files = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(files.values())):
        save_tensors(folder / file, {n: STATE[n] for n in names if files[n] == file})
    text = __import__("json").dumps({"metadata": {"total_size": 1}, "weight_map": files})
    (folder / "model.safetensors.index.json").write_text(text)
    (folder / "config.json").write_text("{}")
    return folder


def test_shards_with_an_index_read_as_their_copy_on_disk(tmp_path: Path, bucket: str) -> None:
    folder = sharded(tmp_path / "model")
    upload_folder(folder, bucket)
    assert_same(bucket, folder)
    assert_same(f"{bucket}/model.safetensors.index.json", folder)


def test_an_expert_reads_as_its_copy_on_disk(tmp_path: Path, bucket: str) -> None:
    weights = {"fc.weight": STATE["fc.weight"]}
    hessian = {"fc.weight": STATE["fc.weight"] ** 2}
    path = write_expert(
        tmp_path / "expert",
        weights=weights,
        hessian=hessian,
        info=ExpertInfo(task="svhn", num_examples=7, estimator="exact"),
    )
    put(path, f"{bucket}/run/expert")
    for url in (f"{bucket}/run/expert", f"{bucket}/run", f"{bucket}/run/expert/model.safetensors"):
        expert = open_expert(url)
        assert expert.info == open_expert(path).info
        assert expert.hessian is not None
        assert torch.equal(expert.hessian.tensor("fc.weight"), hessian["fc.weight"])
        assert torch.equal(expert.weights.tensor("fc.weight"), weights["fc.weight"])
        expert.close()


def test_the_only_expert_below_a_run_is_found(tmp_path: Path, bucket: str) -> None:
    path = write_expert(tmp_path / "e", weights={"a.b": torch.ones(3)}, info=ExpertInfo())
    put(path, f"{bucket}/run/version_0/expert")
    assert str(open_expert(f"{bucket}/run").weights.path).endswith(
        "version_0/expert/model.safetensors"
    )
    put(path, f"{bucket}/run/version_1/expert")
    with pytest.raises(
        InputError, match="must hold one expert folder; got memory://bucket/run/ver"
    ):
        open_expert(f"{bucket}/run")


def test_curvature_of_other_weights_is_refused_from_a_url_too(tmp_path: Path, bucket: str) -> None:
    path = write_expert(
        tmp_path / "e",
        weights={"a.b": torch.ones(3)},
        hessian={"a.b": torch.ones(3)},
        info=ExpertInfo(num_examples=1, estimator="exact"),
    )
    save_tensors(path / "model.safetensors", {"a.b": torch.zeros(3)})
    put(path, f"{bucket}/e")
    with pytest.raises(InputError, match=r"memory://bucket/e/hessian.safetensors: belongs to"):
        open_expert(f"{bucket}/e")


def test_threads_read_at_once_and_fetch_a_block_once(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_BLOCK", 1000)
    monkeypatch.setattr(remote, "_KEPT", 100)
    save_tensors(tmp_path / "m.safetensors", STATE)
    put(tmp_path / "m.safetensors", f"{bucket}/m.safetensors")
    fetched: list[int] = []
    read_range = RemotePath.read_range

    def counted(self: RemotePath, start: int, stop: int) -> bytes:
        fetched.append(start)
        return read_range(self, start, stop)

    monkeypatch.setattr(RemotePath, "read_range", counted)
    found: dict[int, Tensor] = {}
    with open_checkpoint(f"{bucket}/m.safetensors") as opened:
        flat = STATE["fc.weight"].view(-1)

        def read(i: int) -> None:
            parts = [opened.read("fc.weight", s, s + 100) for s in range(0, 2000, 100)]
            found[i] = torch.cat(parts)

        threads = [threading.Thread(target=read, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(found[i], flat) for i in range(8))
    assert len(fetched) == len(set(fetched))


def test_a_pickled_checkpoint_behind_a_url_is_refused(tmp_path: Path, bucket: str) -> None:
    torch.save(STATE, tmp_path / "x.ckpt")
    put(tmp_path / "x.ckpt", f"{bucket}/x.ckpt")
    with pytest.raises(InputError, match=r"x.ckpt: must be safetensors to be read from a URL"):
        open_checkpoint(f"{bucket}/x.ckpt")
    with pytest.raises(InputError, match=r"x.ckpt: must be safetensors to be read from a URL"):
        open_checkpoint(bucket)


def test_a_distributed_checkpoint_behind_a_url_is_refused(bucket: str) -> None:
    fsspec.filesystem("memory").pipe(f"{bucket}/.metadata", b"")
    with pytest.raises(InputError, match="must be safetensors to be read from a URL; got a distr"):
        open_checkpoint(bucket)


def test_a_file_that_was_cut_is_an_error(tmp_path: Path, bucket: str) -> None:
    save_tensors(tmp_path / "m.safetensors", STATE)
    content = (tmp_path / "m.safetensors").read_bytes()
    fsspec.filesystem("memory").pipe(f"{bucket}/m.safetensors", content[:-1])
    with pytest.raises(InputError, match="must be a whole safetensors file of"):
        open_checkpoint(f"{bucket}/m.safetensors")


class OneFile(http.server.BaseHTTPRequestHandler):
    """Serves its content, by ranges or, as plain servers do, only whole."""

    content = b""
    ranges = True

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        part = self.content
        if asked and self.ranges:
            start, stop = map(int, asked.removeprefix("bytes=").split("-"))
            part = part[start : stop + 1]
            self.send_response(206)
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    save_tensors(tmp_path / "model.safetensors", STATE)
    OneFile.content = (tmp_path / "model.safetensors").read_bytes()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(OneFile)) as found:
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}/model.safetensors"
        found.shutdown()
        thread.join()


def test_a_web_server_with_ranges_is_read(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(OneFile, "ranges", True)
    monkeypatch.setattr(remote, "_BLOCK", 1000)
    assert_same(server, tmp_path / "model.safetensors")


def test_a_web_server_without_ranges_is_an_error(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(OneFile, "ranges", False)
    monkeypatch.setattr(remote, "_BLOCK", 1000)
    with pytest.raises(InputError, match="must give the 1000 bytes from byte 0 on; got"):
        open_checkpoint(server)


def test_an_upload_ends_with_what_says_that_it_is_whole(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sharded(tmp_path / "m")
    (folder / "merge.json").write_text("{}")
    (folder / "heads").mkdir()
    save_tensors(folder / "heads" / "svhn.safetensors", STATE)
    files = fsspec.filesystem("memory")
    order: list[str] = []
    put_file = type(files).put_file

    def noted(self: object, local: str, far: str, **more: object) -> None:
        order.append(Path(local).name)
        put_file(self, local, far, **more)

    monkeypatch.setattr(type(files), "put_file", noted)
    upload_folder(folder, f"{bucket}/merged")
    assert order[-1] == "merge.json"
    data = [name.endswith(".safetensors") for name in order]
    assert data == sorted(data, reverse=True)
    for file in folder.rglob("*.*"):
        assert files.cat(f"{bucket}/merged/{file.relative_to(folder)}") == file.read_bytes()


def test_a_folder_that_is_not_empty_is_replaced_only_when_asked(
    tmp_path: Path, bucket: str
) -> None:
    files = fsspec.filesystem("memory")
    files.pipe(f"{bucket}/merged/model.safetensors", b"old")
    folder = sharded(tmp_path / "m")
    with pytest.raises(InputError, match=r"must be empty or absent; got a folder with 'model.safe"):
        upload_folder(folder, f"{bucket}/merged")
    assert files.cat(f"{bucket}/merged/model.safetensors") == b"old"
    upload_folder(folder, f"{bucket}/merged", replace=True)
    found = {name.rsplit("/", 1)[-1] for name in files.ls(f"{bucket}/merged", detail=False)}
    assert found == {file.name for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("merged", "merged: must be a URL"),
        ("https://example.org/merged", "storage that can be written; got a web server"),
        ("memory://bucket/file", "must be a folder; got a file"),
    ],
)
def test_what_cannot_be_written_is_an_error(bucket: str, url: str, message: str) -> None:
    fsspec.filesystem("memory").pipe(f"{bucket}/file", b"x")
    with pytest.raises(InputError, match=message):
        require_free_url(url)


def test_an_upload_that_breaks_off_says_so_and_leaves_no_record(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sharded(tmp_path / "m")
    (folder / "merge.json").write_text("{}")
    files = fsspec.filesystem("memory")
    put_file = type(files).put_file

    def broken(self: object, local: str, far: str, **more: object) -> None:
        if local.endswith("index.json"):
            raise ConnectionError("gone")
        put_file(self, local, far, **more)

    monkeypatch.setattr(type(files), "put_file", broken)
    with pytest.raises(InputError, match=r"got ConnectionError: gone.* nothing there is whole now"):
        upload_folder(folder, f"{bucket}/merged")
    assert not files.exists(f"{bucket}/merged/merge.json")


@pytest.mark.parametrize("file", ["../x", "/x", "a/../../x", "", "C:\\x", "\\x", "a\0b"])
def test_a_path_outside_its_folder_is_told(file: str) -> None:
    assert not is_inside(file)
    assert is_inside("a/b.safetensors")


def test_a_remote_folder_is_walked_as_a_local_one(tmp_path: Path, bucket: str) -> None:
    for name in ("b.txt", "a/expert/expert.json", "c/d/expert/expert.json"):
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_text(name)
    put(tmp_path / "x", f"{bucket}/x")
    far, near = locate(f"{bucket}/x"), tmp_path / "x"
    assert isinstance(far, RemotePath)
    assert [p.name for p in far.iterdir()] == sorted(p.name for p in near.iterdir())
    for pattern in ("**/expert/expert.json", "*.txt", "b.txt", "none*"):
        found = [str(p).removeprefix(str(far)) for p in far.glob(pattern)]
        assert found == sorted(str(p).removeprefix(str(near)) for p in near.glob(pattern))
    for name in ("b.txt", "a", "none"):
        for ask in (RemotePath.exists, RemotePath.is_file, RemotePath.is_dir):
            assert ask(far / name) == getattr(near / name, ask.__name__)()
    assert (far / "b.txt").read_bytes() == b"b.txt"
    assert (far / "b.txt").read_range(1, 4) == b".tx"
    assert (far / "b.txt").size() == (far / "b.txt").stat().st_size == 5
    now = (near / "b.txt").stat().st_mtime_ns
    assert abs((far / "b.txt").stat().st_mtime_ns - now) < 3600e9
    with pytest.raises(InputError, match="must be readable; got FileNotFoundError"):
        (far / "none").read_bytes()


def test_of_a_web_server_only_named_files_are_found(server: str) -> None:
    pytest.importorskip("aiohttp")
    folder = RemotePath(server.rsplit("/", 1)[0] + "/folder")
    assert folder.exists()
    assert folder.is_dir()
    assert [p.name for p in folder.glob("model.safetensors")] == ["model.safetensors"]
    assert list(folder.glob("*.json")) == []
