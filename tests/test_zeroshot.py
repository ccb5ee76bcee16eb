import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

from clip_train import zeroshot
from clip_train.embed import encode_texts
from clip_train.model import Clip
from clip_train.settings import UserError


def test_prompts_fill_both_kinds_of_place_and_keep_braces_of_the_class():
    said = zeroshot.prompts(["fox", "{x}"], ["a {c}, yes a {c}", "the {}"])
    assert said == ["a fox, yes a fox", "the fox", "a {x}, yes a {x}", "the {x}"]


def test_class_rows_are_what_open_clips_zero_shot_classifier_makes(tmp_path):
    import open_clip

    folder = tiny.clip(tmp_path / "clip")
    names, templates = ["red fox", "owl", "one of many"], ["{c}", "a picture of {c}", "the {c}."]
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    truth = open_clip.build_zero_shot_classifier(
        model.eval(), tokenizer, names, [lambda c, t=t: t.format(c=c) for t in templates]
    )
    rows = zeroshot.class_rows(encode_texts(Clip.load(folder), zeroshot.prompts(names, templates)), len(names))
    np.testing.assert_allclose(rows, truth.T, atol=1e-6)


def test_targets_are_names_in_any_case_or_numbers_where_no_label_is_a_name():
    names = ["Red fox", "owl", "7"]
    assert zeroshot.targets(["OWL", "red fox", None, "hen"], names).tolist() == [1, 0, -1, -1]
    assert zeroshot.targets(["0", "2", "3", "-1", None], names).tolist() == [0, 2, -1, -1, -1]
    assert zeroshot.targets(["7", "0"], names).tolist() == [2, -1]  # here 7 is a name, so 0 is no number


def test_zero_shot_figures_worked_by_hand():
    rows = np.eye(6)
    names = list("abcdef")
    # four pictures of a: two right, one taken for b, one for c; one of b: right; one of c: taken for a, c comes second
    image = np.eye(6)[[0, 0, 1, 2, 1, 0]].astype(float)
    image[5, 2] = 0.5
    image += np.array([0.1, 0.2, 0.01, 0, 0, 0])  # so that nothing ties where it would matter
    image[:, 3:] -= [0.1, 0.2, 0.3]
    found = zeroshot.zero_shot(image, rows, np.array([0, 0, 0, 0, 1, 2]), names)
    assert found["acc1"] == pytest.approx(3 / 6) and found["acc5"] == 1 and found["chance"] == pytest.approx(1 / 6)
    assert found["classes"] == 6 and found["classes_seen"] == 3
    assert found["mean_per_class_recall"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert [(one["class"], one["recall"]) for one in found["worst"]] == [("c", 0), ("a", 0.5)]
    assert found["worst"][0]["confused_with"] == {"a": 1.0}
    assert found["worst"][1]["confused_with"] == {"b": 0.25, "c": 0.25}


def test_accuracies_are_those_of_torch_topk_on_random_rows():
    image, rows = tiny.unit_rows(300, 16), tiny.unit_rows(20, 16, seed=1)
    target = np.random.default_rng(2).integers(0, 20, 300)
    found = zeroshot.zero_shot(image, rows, target, [str(i) for i in range(20)])
    top = torch.from_numpy(image @ rows.T).topk(5).indices == torch.from_numpy(target)[:, None]
    assert found["acc1"] == pytest.approx(top[:, 0].float().mean().item())
    assert found["acc5"] == pytest.approx(top.any(1).float().mean().item())


def test_a_class_row_of_opposite_prompts_is_zero_and_not_nan():
    rows = zeroshot.class_rows(F.normalize(torch.tensor([[1.0, 2], [-1, -2]]), dim=1).numpy(), 1)
    assert rows.tolist() == [[0, 0]]


def test_files_of_classes_and_templates_are_read_and_complained_about_in_one_line(tmp_path):
    file = tmp_path / "classes.txt"
    file.write_text("\ufefffox\n\n  owl \n", encoding="utf-8")
    assert zeroshot.read_lines(file, "classes") == ["fox", "owl"]
    with pytest.raises(UserError, match="classes.txt is empty"):
        file.write_text("\n")
        zeroshot.read_lines(file, "classes")
    with pytest.raises(UserError, match="is not UTF-8"):
        file.write_bytes(b"\xff\xfe")
        zeroshot.read_lines(file, "classes")
    with pytest.raises(UserError, match="nowhere.txt cannot be read"):
        zeroshot.read_lines(tmp_path / "nowhere.txt", "classes")
    with pytest.raises(UserError, match="'a photo' has no place for the class"):
        zeroshot.checked_templates(["{c}", "a photo"])
