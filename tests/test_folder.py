import hashlib
import json
import os
from pathlib import Path

import pytest

from clip_train.folder import Input, Workspace, fingerprint_json, read_manifest, write_file
from clip_train.settings import UserError

INPUTS = {"shards": Input("sha256:1", "shards")}


def made(out, config=None, inputs=INPUTS):
    work = Workspace.open(out, "clip", config or {"width": 1}, inputs)
    (work.path / "weights").write_bytes(b"abc")
    return work.publish({"loss": 2.0})


def test_a_folder_appears_only_when_it_is_whole(tmp_path):
    work = Workspace.open(tmp_path / "clip", "clip", {}, {})
    assert not (tmp_path / "clip").exists() and work.path.is_dir()
    work.publish()
    assert [p.name for p in tmp_path.iterdir()] == ["clip"]
    assert read_manifest(tmp_path / "clip", "clip").kind == "clip"


def test_the_same_command_again_has_nothing_to_do(tmp_path):
    made(tmp_path / "clip")
    again = Workspace.open(tmp_path / "clip", "clip", {"width": 1}, INPUTS)
    assert again.done.result == {"loss": 2.0}


def test_what_a_killed_run_left_is_there_when_it_is_run_again(tmp_path):
    first = Workspace.open(tmp_path / "clip", "clip", {"width": 1}, INPUTS)
    (first.path / "part").write_text("half")
    first.release()  # as the death of its process does
    second = Workspace.open(tmp_path / "clip", "clip", {"width": 1}, INPUTS)
    assert (second.path / "part").read_text() == "half"


def test_two_processes_cannot_write_one_folder(tmp_path):
    work = Workspace.open(tmp_path / "clip", "clip", {}, {})
    with pytest.raises(UserError, match="another process"):
        Workspace.open(tmp_path / "clip", "clip", {}, {})
    work.publish()


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_or_inputs_are_refused_by_name(tmp_path, finished):
    if finished:
        made(tmp_path / "clip")
    else:
        work = Workspace.open(tmp_path / "clip", "clip", {"width": 1}, INPUTS)
        (work.path / "part").write_text("made in hours")
        work.release()
    with pytest.raises(UserError, match="width = 1, but 2"):
        Workspace.open(tmp_path / "clip", "clip", {"width": 2}, INPUTS)
    with pytest.raises(UserError, match="other shards"):
        Workspace.open(tmp_path / "clip", "clip", {"width": 1}, {"shards": Input("sha256:2", "elsewhere")})


def test_the_fingerprint_is_of_names_and_contents_and_leaves_logs_out(tmp_path):
    first = made(tmp_path / "a")
    work = Workspace.open(tmp_path / "b", "clip", {"other": 1}, {})
    (work.path / "weights").write_bytes(b"abc")
    (work.path / "metrics.jsonl").write_text("noise")
    (work.path / "checkpoint.safetensors").write_text("dropped")
    second = work.publish()
    line = f"weights\0{hashlib.sha256(b'abc').hexdigest()}\n".encode()
    assert first.fingerprint == second.fingerprint == "sha256:" + hashlib.sha256(line).hexdigest()
    assert sorted(os.listdir(tmp_path / "b")) == ["manifest.json", "metrics.jsonl", "weights"]


def test_inputs_are_found_again_after_the_whole_tree_has_moved(tmp_path):
    (tmp_path / "old" / "shards").mkdir(parents=True)
    made(tmp_path / "old" / "clip", inputs={"shards": Input("x", tmp_path / "old" / "shards")})
    (tmp_path / "old").rename(tmp_path / "new")
    assert read_manifest(tmp_path / "new" / "clip").input_path("shards") == tmp_path / "new" / "shards"


def test_folders_that_cannot_be_used_are_refused_in_one_line(tmp_path):
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "mine.txt").write_text("x")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{")
    made(tmp_path / "clip")
    for folder, kind, words in [
        ("missing", "clip", "does not exist; make it: unclip train clip"),
        ("strange", "clip", "did not make it"),
        ("broken", "clip", "cannot be read"),
        ("clip", "index", "of kind clip, but index is needed"),
    ]:
        with pytest.raises(UserError, match=words) as caught:
            read_manifest(tmp_path / folder, kind)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="unclip did not make it"):
        Workspace.open(tmp_path / "strange", "clip", {}, {})


def test_write_file_leaves_the_old_file_when_it_cannot_write(tmp_path):
    write_file(tmp_path / "a.json", b"old")
    with pytest.raises(UserError, match="cannot write"):
        write_file(tmp_path / "missing" / "a.json", b"new")
    assert (tmp_path / "a.json").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_json_fingerprint_does_not_depend_on_the_order_of_keys():
    assert fingerprint_json({"a": 1, "b": 2}) == fingerprint_json(json.loads('{"b": 2, "a": 1}'))
    assert fingerprint_json({"a": 1}) != fingerprint_json({"a": 2})


def test_a_run_killed_while_it_publishes_still_has_its_checkpoint(tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def die(*_):
        raise Killed

    work = Workspace.open(tmp_path / "clip", "clip", {"width": 1}, INPUTS)
    (work.path / "scratch").mkdir()
    for name in ("weights", "checkpoint.safetensors", "scratch/cache"):
        (work.path / name).write_text(name)
    for step in ("clip_train.folder.fingerprint_files", "clip_train.folder.os.rename"):
        with monkeypatch.context() as patch:
            patch.setattr(step, die)
            with pytest.raises(Killed):
                work.publish()
    work.release()
    again = Workspace.open(tmp_path / "clip", "clip", {"width": 1}, INPUTS)
    assert (again.path / "checkpoint.safetensors").exists() and (again.path / "scratch" / "cache").exists()
    again.publish()
    assert sorted(os.listdir(tmp_path / "clip")) == ["manifest.json", "weights"]


def struck_while_it_sweeps(out, monkeypatch):
    """A folder that was finished, but for the sweep."""
    work = Workspace.open(out, "clip", {"width": 1}, INPUTS)
    for name in ("weights", "checkpoint.safetensors", "checkpoint-000000003/part", "scratch/a/cache", "scratch/.half"):
        (work.path / name).parent.mkdir(parents=True, exist_ok=True)
        (work.path / name).write_text(name)
    with monkeypatch.context() as patch:
        patch.setattr("clip_train.folder._sweep", lambda folder: None)
        work.publish()


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_what_a_user_put_into_a_finished_folder_stays_when_the_sweep_is_made_up_for(tmp_path, monkeypatch):
    struck_while_it_sweeps(tmp_path / "clip", monkeypatch)
    mine = [".git/HEAD", ".notes", "checkpoint-mine/x", "checkpoint-notes.txt", "logs/.x", "scratch/mine"]
    for name in mine:
        (tmp_path / "clip" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "clip" / name).write_text("mine")
    assert Workspace.open(tmp_path / "clip", "clip", {"width": 1}, INPUTS).done
    assert files(tmp_path / "clip") == sorted([*mine, "manifest.json", "weights"])


def test_the_sweep_is_made_up_for_as_long_as_something_stays(tmp_path, monkeypatch):
    struck_while_it_sweeps(tmp_path / "clip", monkeypatch)
    real = Path.unlink

    def unlink(path, *rest):
        if path.name == "cache":
            raise PermissionError
        real(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        assert Workspace.open(tmp_path / "clip", "clip", {"width": 1}, INPUTS).done
    assert files(tmp_path / "clip") == ["manifest.json", "plan.json", "scratch/a/cache", "weights"]
    assert Workspace.open(tmp_path / "clip", "clip", {"width": 1}, INPUTS).done
    assert sorted(os.listdir(tmp_path / "clip")) == ["manifest.json", "weights"]


def test_a_plan_that_names_other_files_as_left_over_removes_none_of_them(tmp_path, monkeypatch):
    struck_while_it_sweeps(tmp_path / "clip", monkeypatch)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "x").write_text("mine")
    (tmp_path / "clip" / "scratch" / "link").symlink_to(tmp_path / "else")
    plan = tmp_path / "clip" / "plan.json"
    for names in (["weights", "../else/x", str(tmp_path / "else" / "x"), "scratch/link/x"], [[]], 3, {"weights": 1}):
        plan.write_text(json.dumps({"leftovers": names}))
        assert Workspace.open(tmp_path / "clip", "clip", {"width": 1}, INPUTS).done
    assert (tmp_path / "else" / "x").exists() and (tmp_path / "clip" / "weights").exists()


def test_a_finished_folder_stays_finished_if_another_process_sweeps_it_first(tmp_path, monkeypatch):
    real = os.rename

    def rename(old, new):
        real(old, new)
        assert Workspace.open(tmp_path / "clip", "clip", {"width": 1}, INPUTS).done

    work = Workspace.open(tmp_path / "clip", "clip", {"width": 1}, INPUTS)
    (work.path / "scratch").mkdir()
    (work.path / "weights").write_text("abc")
    monkeypatch.setattr("clip_train.folder.os.rename", rename)
    work.publish()
    assert sorted(os.listdir(tmp_path / "clip")) == ["manifest.json", "weights"]


def test_a_refusal_names_the_one_setting_that_differs_and_not_how_the_run_is_watched(tmp_path):
    def config(**fit):
        return {"width": 1, "fit": {"lr": 0.1, "save_every": 60} | fit}

    made(tmp_path / "clip", config())
    with pytest.raises(UserError, match=r"made with fit\.lr = 0\.1, but 0\.2 is asked"):
        Workspace.open(tmp_path / "clip", "clip", config(lr=0.2), INPUTS)
    assert Workspace.open(tmp_path / "clip", "clip", config(save_every=5), INPUTS).done


def test_files_that_a_killed_run_was_in_the_middle_of_writing_are_swept_away(tmp_path):
    whole = made(tmp_path / "whole")
    first = Workspace.open(tmp_path / "clip", "clip", {"width": 1}, INPUTS)
    (first.path / ".tmpqKovTs").write_text("half of a checkpoint")
    (first.path / "weights").write_bytes(b"abc")
    first.release()
    second = Workspace.open(tmp_path / "clip", "clip", {"width": 1}, INPUTS)
    assert not (second.path / ".tmpqKovTs").exists()
    (second.path / ".half").write_text("x")
    assert second.publish().fingerprint == whole.fingerprint
    assert sorted(os.listdir(tmp_path / "clip")) == ["manifest.json", "weights"]


def test_a_run_that_made_nothing_yet_does_not_stand_in_the_way_of_other_settings(tmp_path):
    Workspace.open(tmp_path / "clip", "clip", {"width": 1}, INPUTS).release()
    work = Workspace.open(tmp_path / "clip", "clip", {"width": 2}, INPUTS)
    assert json.loads((work.path / "plan.json").read_text())["config"] == {"width": 2}


def test_addresses_and_names_are_noted_as_they_are_without_passwords(tmp_path):
    inputs = {
        "shards": Input("sha256:1", "s3://me:secret@bucket/{0..3}.tar?signature=abc"),
        "init": Input("sha256:2", "ViT-B-32:openai"),
    }
    work = Workspace.open(tmp_path / "clip", "clip", {}, inputs)
    plan = (work.path / "plan.json").read_text()
    assert "secret" not in plan and "abc" not in plan
    noted = {name: one["path"] for name, one in json.loads(plan)["inputs"].items()}
    assert noted == {"shards": "s3://bucket/{0..3}.tar", "init": "ViT-B-32:openai"}
    assert work.publish().input_path("shards") is None


def test_a_command_that_a_manifest_names_is_never_taken_for_a_place(tmp_path):
    for spec in ("pipe:cat {0..3}.tar", "shards::s3://b/{0..3}.tar"):
        work = Workspace.open(tmp_path / str(len(spec)), "clip", {}, {"shards": Input("sha256:1", spec)})
        made = work.publish()
        assert made.inputs["shards"]["path"] == spec and made.input_path("shards") is None
