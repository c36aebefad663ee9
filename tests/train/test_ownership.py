"""Nothing of the user's is deleted or overwritten, whatever `memdec` is told to write where.

Every case is typed as a person types it, and every file that was there is there afterwards.
"""

import json
import os
import shutil

import pytest

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data import ownership
from vllm_memdec.train.data.artifacts import build_artifact
from vllm_memdec.train.data.ownership import MANIFEST, PLAN, is_ours, retire
from vllm_memdec.train.pipeline import STAGES

TEXT = "Some words that make a corpus. " * 40
SMALL = {"corpus": {"block_tokens": 32}}


def files(folder):
    """Return the content of every file under a folder, and where links lead to."""
    return {
        str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.read_bytes()
        for p in folder.rglob("*")
        if p.is_symlink() or p.is_file()
    }


@pytest.fixture
def project(tiny_model, tmp_path, command, monkeypatch):
    """Return a command in a project's folder: base, corpus, validation and a thesis lie there."""
    folder = tmp_path / "project"
    shutil.copytree(tiny_model("llama"), folder / "base")
    for name in ("corpus", "validation"):
        (folder / name / "deep").mkdir(parents=True)
        (folder / name / "deep" / "a.txt").write_text(TEXT + name)
    (folder / "thesis").mkdir()
    (folder / "thesis" / "thesis.txt").write_text("years of work")
    monkeypatch.chdir(folder)
    memdec = command("base", "corpus", SMALL, "elsewhere")
    memdec.folder = folder
    return memdec


def refused(memdec, *parts, **options):
    """Check that a build is refused in one sentence and that it left no trace."""
    before = files(memdec.folder)
    code, err = memdec.here(**options)
    assert code == 1 and len(err.splitlines()) == 1, err
    assert err.startswith("memdec: ") and err.endswith(".\n")
    for part in parts:
        assert part in err
    assert files(memdec.folder) == before


@pytest.mark.parametrize(
    ("output", "part"),
    [
        (".", "project/corpus lies inside --output"),
        ("./", "lies inside --output"),
        ("../project", "lies inside --output"),
        ("corpus", "is --corpus itself: choose another folder"),
        ("corpus/deep", "lies inside --corpus"),
        ("corpus/deep/a.txt", "lies inside --corpus"),
        ("validation/out", "lies inside --validation"),
        ("base", "is --base itself"),
        ("base/memory", "project/base: choose a folder outside"),
    ],
)
def test_places_that_people_type(project, output, part):
    refused(project, part, output=output, validation="validation")


def test_links_are_followed(project):
    os.symlink("corpus", "linked")
    refused(project, "is --corpus itself", output="linked")
    os.mkdir("out")
    os.rename("base", "out/base")
    os.symlink("out/base", "base")
    refused(project, "--base", "lies inside --output", output="out")


@pytest.mark.parametrize("option", ["base", "init", "tokenizer", "corpus", "validation"])
def test_inputs_inside_the_output(project, option):
    shutil.copytree("validation" if option in ("corpus", "validation") else "base", "out/export")
    options = {option: "out/export", "output": "out"}
    if option == "tokenizer":
        options["init"] = "./base"
    refused(project, f"--{option} ", "lies inside --output", "choose another output", **options)


@pytest.mark.parametrize("name", ["export", "corpus.partial", "memory"])
@pytest.mark.parametrize("kind", ["folder", "file", "link", "another's manifest", "empty manifest"])
def test_what_is_named_as_a_stage(project, name, kind):
    os.mkdir("out")
    match kind:
        case "folder":
            shutil.copytree("thesis", f"out/{name}")
        case "file":
            shutil.copy("thesis/thesis.txt", f"out/{name}")
        case "link":
            os.symlink("../thesis", f"out/{name}")
        case "another's manifest":  # of a web application
            shutil.copytree("thesis", f"out/{name}")
            with open(f"out/{name}/{MANIFEST}", "w") as file:
                json.dump({"name": "app", "icons": []}, file)
        case "empty manifest":
            shutil.copytree("thesis", f"out/{name}")
            for other in (MANIFEST, PLAN):
                open(f"out/{name}/{other}", "w").close()
    refused(project, f"out/{name} is in the way", "move it elsewhere", output="out")


def test_another_stage_s_folder_is_not_ours(pipeline, tmp_path):
    copy = shutil.copytree(pipeline.output / "index", tmp_path / "targets")
    assert is_ours(copy, "index") and not is_ours(copy, "targets")


def test_a_stranger_s_file_in_an_artifact_is_kept(pipeline, build, tmp_path):
    out = shutil.copytree(pipeline.output, tmp_path / "out")
    (out / "export" / "README.md").write_text("my model card")
    (out / "export" / "logs").mkdir()
    (out / "export" / "logs" / "serve.log").write_text("my log")
    (out / "export" / "a.tmp").write_text("mine")
    (out / "export" / "notes").mkdir()
    (out / "export" / "notes" / "a.txt").write_text("my notes")
    kept = out / "export.kept"
    shutil.copytree(pipeline.output / "corpus", kept)  # the name is taken
    lines = build(pipeline.base, pipeline.corpus, out, {"export": {"alpha": 0.25}})
    assert files(out / "export.kept-2") == {
        "README.md": b"my model card",
        "a.tmp": b"mine",
        "logs/serve.log": b"my log",
        "notes/a.txt": b"my notes",
    }
    assert files(kept) == files(pipeline.output / "corpus")
    assert any(
        "moved to" in line and "README.md, a.tmp, logs/serve.log and 1 more" in line
        for line in lines
    )
    assert not (out / "export" / "README.md").exists()
    again = build(pipeline.base, pipeline.corpus, out, {"export": {"alpha": 0.25}})
    assert again == [f"{stage}: up to date" for stage in STAGES]


def test_a_stage_on_another_disk_keeps_its_folder(pipeline, build, tmp_path):
    """A link that somebody made is replaced; what it leads to stays."""
    out = shutil.copytree(pipeline.output, tmp_path / "out")
    (out / "export").rename(tmp_path / "disk")
    (out / "export").symlink_to(tmp_path / "disk")
    before = files(tmp_path / "disk")
    build(pipeline.base, pipeline.corpus, out, {"export": {"alpha": 0.25}})
    assert files(tmp_path / "disk") == before and not (out / "export").is_symlink()


def test_a_lock_file_of_another_program_is_not_emptied(pipeline, build, tmp_path):
    out = shutil.copytree(pipeline.output, tmp_path / "out")
    (out / ".lock").write_text("12345")
    build(pipeline.base, pipeline.corpus, out)
    assert (out / ".lock").read_text() == "12345"


def make_a(work):
    (work / "a").write_text("a")


def test_a_kill_while_the_old_artifact_is_removed(tmp_path, monkeypatch):
    """What is left of the old folder can be told as ours; the finished work gets its name."""
    path = tmp_path / "memory"
    build_artifact(path, "memory", {"n": 1}, {}, make_a, lambda line: None)

    def killed(folder, work, say):
        (folder / "a").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("vllm_memdec.train.data.artifacts.retire", killed)
    with pytest.raises(KeyboardInterrupt):
        build_artifact(path, "memory", {"n": 2}, {}, make_a, lambda line: None)
    monkeypatch.setattr("vllm_memdec.train.data.artifacts.retire", retire)
    build_artifact(path, "memory", {"n": 2}, {}, pytest.fail, lambda line: None)
    assert (path / "a").read_text() == "a"


def test_a_kill_while_unfinished_work_is_removed(tmp_path, monkeypatch):
    path, work = tmp_path / "memory", tmp_path / "memory.partial"

    def interrupted(work):
        make_a(work)
        raise KeyboardInterrupt

    def killed(folder, last):
        raise KeyboardInterrupt

    for settings in ({"n": 1}, {"n": 2}):
        monkeypatch.setattr("vllm_memdec.train.data.artifacts.remove", killed)
        with pytest.raises(KeyboardInterrupt):
            build_artifact(path, "memory", settings, {}, interrupted, lambda line: None)
    assert (work / "a").exists()
    monkeypatch.undo()
    said = []

    def make(folder):
        assert not (folder / "a").exists()  # half removed: not to be taken up

    build_artifact(path, "memory", {"n": 1}, {}, make, said.append)
    assert said == ["memory: starting over, the unfinished work was for other settings or inputs"]


def test_a_kill_before_the_plan_is_written(tmp_path):
    work = tmp_path / "memory.partial"
    work.mkdir()
    (work / "plan.json.01234567.tmp").write_text("{")
    artifact = build_artifact(tmp_path / "memory", "memory", {}, {}, make_a, lambda line: None)
    assert list(artifact.manifest["files"]) == ["a"]


@pytest.mark.parametrize("name", ["export/config.json", "corpus/new.json", "notes.json"])
@pytest.mark.parametrize("words", [("verify",), ("explain",), ("plan",), ("calibrate",)])
def test_reports_go_over_nothing_but_reports(pipeline, tmp_path, memdec_here, name, words):
    out = shutil.copytree(pipeline.output, tmp_path / "out")
    (out / "notes.json").write_text('{"mine": 1}')
    memory, base, text = out / "export", pipeline.base, pipeline.corpus
    options = {
        "verify": (out,),
        "explain": ("Some text.", "--base", base, "--memory", memory),
        "plan": ("--base", base, "--corpus", text),
        "calibrate": (memory, "--base", base, "--domain", text, "--general", text),
    }[words[0]]
    before = files(out)
    option = "--html" if words[0] == "explain" else "--json"
    code, _, err = memdec_here(*words, *options, option, out / name)
    assert code == 1 and len(err.splitlines()) == 1, err
    said = "is no report of memdec" if "/" not in name else "among the files of a build's stage"
    assert said in err and f"give {option} another" in err and files(out) == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("all.json", '{"mine": 1, "verify": {"written_by": "memdec"}}'),
        ("notes.md", '"written_by": "memdec"' + " " * 400 + ownership.PAGE.decode()),
        ("empty.json", ""),
    ],
)
def test_a_file_that_quotes_a_report_is_none(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(MemdecError, match="is no report of memdec"):
        ownership.check_report(tmp_path / name)


def test_a_report_is_written_over_by_the_next(pipeline, tmp_path, memdec_here):
    report, page = tmp_path / "report.json", tmp_path / "page.html"
    words = ("explain", "Some text.", "--base", pipeline.base, "--tokens", 1,
             "--memory", pipeline.output / "export", "--json", report, "--html", page)  # fmt: skip
    for _ in range(2):
        code, _, err = memdec_here(*words)
        assert code == 0, err
    assert json.loads(report.read_text())["written_by"] == "memdec"
