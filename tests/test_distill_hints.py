"""Hints and the look inside a student: values and gradients against NumPy, shapes that differ."""

import numpy as np
import pytest
import torch

from coursepack.distill.losses.base import FeaturePair, LossInputs, StudentOutput
from coursepack.distill.losses.hint import Adapter, Hints
from coursepack.distill.setup.student import StudentShapes, blocks, probe_student, watched
from coursepack.distill.targets.base import Targets
from coursepack.errors import RecipeError
from coursepack.models import Network, Preprocessing, build_network


def inputs_of(student, teacher):
    targets = Targets([], {(1, "tap"): torch.from_numpy(teacher).float()}, (0, 1))
    output = StudentOutput(torch.zeros(len(student), 10), features={"layer": student})
    return LossInputs(output, torch.zeros(len(student)).long(), targets)


def pooled_to(maps, size):
    """Mean over equal cells, for sizes that divide."""
    rows, channels, height, width = maps.shape
    return maps.reshape(rows, channels, size, height // size, size, width // size).mean((3, 5))


@pytest.mark.parametrize(
    ("student_shape", "teacher_shape"),
    [((5,), (3,)), ((5, 4, 4), (3, 2, 2)), ((5, 4, 4), (3, 4, 4)), ((5, 4, 4), (3,)), ((5,), (3, 2, 2))],
)
def test_value_and_gradient(student_shape, teacher_shape):
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(6, *student_shape)), rng.normal(size=(6, *teacher_shape))
    module = Hints([FeaturePair(1, "tap", "layer", teacher_shape, student_shape)], seed=2)
    weight, bias = (value.detach().double().numpy() for value in module.adapters[0].parameters())
    weight = weight.reshape(3, 5)

    def reference(student):
        ours, theirs = student, teacher
        if len(student_shape) == len(teacher_shape) == 3:
            ours = pooled_to(ours, teacher_shape[1])
        else:
            ours = ours.reshape(6, 5, -1).mean(2)[:, :, None, None]
            theirs = theirs.reshape(6, 3, -1).mean(2)[:, :, None, None]
        changed = np.einsum("oc,nchw->nohw", weight, ours) + bias[:, None, None]
        return ((changed - theirs) ** 2).mean((1, 2, 3))

    tensor = torch.from_numpy(student).float().requires_grad_()
    value = module(inputs_of(tensor, teacher))
    np.testing.assert_allclose(value.detach().numpy(), reference(student), rtol=1e-4)
    value.sum().backward()
    place = (2, *(0 for _ in student_shape))
    moved = [student.copy(), student.copy()]
    moved[0][place] += 1e-5
    moved[1][place] -= 1e-5
    slope = (reference(moved[0]).sum() - reference(moved[1]).sum()) / 2e-5
    assert tensor.grad[place].item() == pytest.approx(slope, rel=1e-3, abs=1e-5)
    assert all(parameter.grad.abs().max() > 0 for parameter in module.parameters())


def test_maps_of_a_larger_teacher_are_matched_in_size():
    adapter = Adapter((5, 2, 2), (3, 7, 5))
    assert adapter(torch.zeros(4, 5, 2, 2)).shape == (4, 3, 7, 5)


def test_adapters_depend_on_the_seed_alone():
    hints = [FeaturePair(0, "a", "b", (3,), (5,))]
    first, again, other = (Hints(hints, seed=seed).adapters[0].change.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_embedding_is_the_input_of_the_head():
    network = build_network("digits-cnn", 10)
    images = torch.randn(4, 1, 8, 8)
    with watched(network, ["hidden"], embedding=True) as output:
        seen = output(network.module(images))
    torch.testing.assert_close(seen.embedding, torch.relu(seen.features["hidden"]))
    with watched(network, ["conv2"], embedding=True, embedding_layer="conv2") as output:
        seen = output(network.module(images))
    assert torch.equal(seen.embedding, seen.features["conv2"].amax((2, 3)))
    assert seen.embedding.requires_grad


def test_shapes_inside_a_student():
    network = build_network("digits-resnet", 10)
    network.module.train()
    before = {name: value.clone() for name, value in network.module.state_dict().items()}
    shapes = probe_student(network, 1, ["layer1", "layer2"], embedding=True)
    assert shapes == StudentShapes((10,), 64, {"layer1": (32, 8, 8), "layer2": (64, 4, 4)})
    assert network.module.training
    after = network.module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items()), "a look changes nothing"
    assert blocks(network.module) == ["stem", "layer1", "layer2"]


def test_a_student_without_a_head_is_told_to_name_a_layer():
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10), torch.nn.Linear(10, 7))
    network = Network("odd", module, Preprocessing(size=8, mean=(0.0,), std=(1.0,)), 10)
    with pytest.raises(
        RecipeError, match=r"does not end in a linear layer of 10 classes.*fusion\.layer=LAYER"
    ):
        probe_student(network, 1, embedding=True)


class Switched(torch.nn.ReLU):
    """ReLU that works in place on demand."""

    def forward(self, values):
        return torch.relu_(values) if self.inplace else torch.relu(values)


def looked_into(*layers):
    """A network and a function that returns the first layer's output, as watched and as handed on."""
    module = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(4 * 6 * 6, 10))
    network = Network("own", module, Preprocessing(size=8, mean=(0.0,), std=(1.0,)), 10)
    handed_on = []
    module[0].register_forward_hook(lambda _module, _inputs, output: handed_on.append(output))

    def look(images):
        with watched(network, ["0"], embedding=False) as output:
            return output(network.module(images)).features["0"], handed_on[-1]

    return network, look


def test_an_output_is_copied_only_if_a_later_layer_changes_it():
    images = torch.randn(2, 1, 8, 8, generator=torch.manual_seed(0))
    for in_place in (False, True):
        network, look = looked_into(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(inplace=in_place))
        gradients = []
        for step in range(3):
            seen, output = look(images)
            assert torch.equal(seen, network.module[0](images)), "of before the ReLU"
            assert (seen.data_ptr() == output.data_ptr()) == (step > 0 and not in_place)
            network.module.zero_grad()
            (seen.square().sum() + seen.sum() + output.sum()).backward()
            gradients.append(network.module[0].weight.grad.clone())
        assert all(torch.equal(gradients[0], other) for other in gradients[1:])


def test_a_layer_that_begins_to_work_in_place_is_refused_once():
    network, look = looked_into(torch.nn.Conv2d(1, 4, 3), Switched())
    images = torch.randn(2, 1, 8, 8)
    for _ in range(2):
        look(images)
    network.module[1].inplace = True
    with pytest.raises(RecipeError, match="changed the output of layer '0' in place"):
        look(images)
    seen, output = look(images)
    assert (seen < 0).any()
    assert not (output < 0).any()
