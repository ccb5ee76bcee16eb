import crew
import pytest
import torch

from clip_train.gradients import make_gradients, seed_part
from clip_train.objective import ClipObjective
from clip_train.parallel import Team

CPU = torch.device("cpu")


def gradients_in_parts(towers, objective, batch, accumulate):
    team = Team(towers, "ddp", CPU)
    loss, numbers = make_gradients(
        team, objective, dict(batch), accumulate=accumulate, precision="fp32", seed=3, step=5, factor=2.0
    )
    return loss, numbers, {name: p.grad / 2 for name, p in towers.named_parameters()}


def towers(**how):
    torch.manual_seed(0)
    return crew.Towers(**how).train()


@pytest.mark.parametrize("loss", ["infonce", "siglip"])
def test_parts_make_the_gradient_of_the_whole_batch_when_nothing_is_random(loss):
    batch, objective = next(crew.batches(24)(0)), ClipObjective(loss=loss, augment=0.0)
    made = [gradients_in_parts(towers(bias=loss == "siglip"), objective, batch, parts) for parts in (1, 2, 3, 24)]
    for value, numbers, gradients in made[1:]:
        assert torch.allclose(value, made[0][0], atol=1e-6) and numbers["chance"] == made[0][1]["chance"]
        for name, gradient in gradients.items():
            assert torch.allclose(gradient, made[0][2][name], atol=1e-6), name


@pytest.mark.parametrize("norm", [False, True], ids=["layer norm", "batch norm"])
def test_parts_with_dropout_and_moved_pictures_make_the_gradient_of_one_graph_over_all_of_them(norm):
    batch, objective = next(crew.batches(24)(0)), ClipObjective(loss="infonce", augment=1.0)
    cached = towers(dropout=0.3, norm=norm)
    value, _, gradients = gradients_in_parts(cached, objective, batch, 4)

    # the truth: the same four passes in one graph, what is random in each seeded in the same way
    plain, seen = towers(dropout=0.3, norm=norm), []
    for i in range(4):
        part = {name: t.chunk(4)[i] for name, t in batch.items()}
        seen.append(objective.rows(plain, part, seed_part(3, 5, i, CPU)))
    image, text = (torch.cat([rows[i] for rows in seen]) for i in (0, 1))
    truth, _ = objective.loss((image, text, seen[-1][2]), batch)
    truth.backward()
    assert torch.allclose(value, truth, atol=1e-6)
    for name, p in plain.named_parameters():
        assert torch.allclose(gradients[name], p.grad, atol=1e-6), name
    if norm:  # the running statistics have seen each part once
        assert cached.image[1].num_batches_tracked == 4
        for name, statistic in plain.named_buffers():
            assert torch.equal(statistic, dict(cached.named_buffers())[name]), name
