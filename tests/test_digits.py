"""The digits tasks: views, questions and the split that all of them share."""

import pytest
import torch

from lit_merge.errors import InputError
from lit_merge.tasks.digits import IMAGE_SIZE, DigitsTask


def images_of(view: str, split: str = "train") -> torch.Tensor:
    examples = DigitsTask(view=view).split(split)
    return torch.stack([examples[i][0] for i in range(20)])


def test_no_test_drawing_is_a_training_drawing() -> None:
    task = DigitsTask()
    train = {task.train[i][0].numpy().tobytes() for i in range(len(task.train))}
    test = {task.test[i][0].numpy().tobytes() for i in range(len(task.test))}
    assert (len(train), len(test)) == (1300, 497)
    assert not train & test


def test_views_show_the_same_drawings() -> None:
    upright = images_of("upright")
    assert upright.shape == (20, 1, IMAGE_SIZE, IMAGE_SIZE)
    assert torch.equal(images_of("mirrored").flip(3), upright)
    assert torch.equal(images_of("upside-down").flip(2), upright)
    torch.testing.assert_close(1 - images_of("negative"), upright)


def test_tilting_six_times_is_a_full_turn() -> None:
    from lit_merge.tasks.digits import _tilt

    blob = torch.zeros(1, 1, 33, 33)
    blob[0, 0, 10:14, 16:20] = 1.0
    turned = blob
    for _ in range(6):
        turned = _tilt(turned)
    centre = [(image[0, 0].nonzero().float().mean(0)) for image in (blob, (turned > 0.2).float())]
    torch.testing.assert_close(centre[0], centre[1], atol=0.6, rtol=0)
    assert (_tilt(blob) - blob).abs().max() > 0.5


def test_the_questions_label_the_same_digits() -> None:
    digit, odd = DigitsTask(view="tilted").test, DigitsTask(view="tilted", question="odd").test
    assert [int(digit[i][1]) % 2 for i in range(50)] == [int(odd[i][1]) for i in range(50)]
    assert DigitsTask(question="odd").num_classes == 2


@pytest.mark.parametrize(("option", "value"), [("view", "sideways"), ("question", "prime")])
def test_an_unknown_view_or_question_names_the_choices(option: str, value: str) -> None:
    with pytest.raises(InputError, match=f"{option}: must be one of .*; got '{value}'"):
        DigitsTask(**{option: value})
