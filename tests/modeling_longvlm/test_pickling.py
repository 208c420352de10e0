"""Models, engines, pipelines and videos can be pickled, saved and copied at any time, and go on as before."""

import copy
import io
import pickle

import pytest
import torch
from transformers import pipeline

from tests.helpers.tiny_models import noise_video, save_tiny_longvlm, tiny_text_config
from tests.helpers.video_files import write_video

SHORT = {"max_new_tokens": 4, "min_new_tokens": 4}
IDS = torch.tensor([[5, 6, 7]])


def pickled(value):
    return pickle.loads(pickle.dumps(value))


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = pytest.mark.parametrize("way", [pickled, saved, copy.deepcopy, copy.copy], ids=lambda way: way.__name__)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("film") / "film.mp4", 20)


@pytest.fixture(params=["own embeddings", "tied embeddings"])
def used(request, tmp_path, film):
    """A pipeline after calls of every kind; transformers has hung its functions on the layers."""
    text = tiny_text_config(tie_word_embeddings=request.param == "tied embeddings")
    pipe = pipeline("video-question-answering", model=str(save_tiny_longvlm(tmp_path, text_config=text)))
    pipe(video=film, question="A?", stop_sequence="never", **SHORT)
    messages = [{"role": "user", "content": "What?"}]
    list(pipe.engine.stream(messages, max_new_tokens=2))
    pipe.engine.score_choices(messages, ["a", "b"])
    with torch.no_grad():
        pipe.model.get_video_features(noise_video(5), output_hidden_states=True, output_attentions=True)
        pipe.model(IDS, output_hidden_states=True)
    with pytest.raises(AttributeError, match="pickle"):  # what transformers' own models say
        pickle.dumps(pipe.model.model.language_model.layers)
    return pipe


@WAYS
def test_a_model_that_has_been_used_computes_the_same_afterwards(used, way):
    model, again = used.model, way(used.model)
    assert type(again) is type(model)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    tied = model.config.text_config.tie_word_embeddings
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied
    with torch.no_grad():
        for one in (model, again):  # also the one that was copied goes on
            outputs = one(IDS, output_hidden_states=True)
            assert len(outputs.hidden_states) == 3
        assert torch.equal(outputs.logits, model(IDS).logits)
        layers = [one.get_video_features(noise_video(5), output_hidden_states=True) for one in (model, again)]
    assert len(layers[1].hidden_states) == 3  # each once
    for one, other in zip(layers[0].hidden_states, layers[1].hidden_states, strict=True):
        assert torch.equal(one, other)


@WAYS
def test_hooks_of_the_user_stay(used, way):
    used.model.model.language_model.layers[1].register_forward_hook(count_calls)
    CALLS.clear()
    way(used.model)(IDS, output_hidden_states=True)
    assert len(CALLS) == 1


CALLS = []


def count_calls(module, args, output):
    CALLS.append(1)


@WAYS
def test_engines_and_pipelines_answer_the_same_afterwards(used, film, way):
    expected = used(video=film, question="A?", **SHORT)
    again = way(used)
    assert again.engine.model is again.model
    assert again(video=film, question="A?", **SHORT) == expected
    engine = way(used.engine)
    content = [{"type": "video", "video": film}, {"type": "text", "text": "A?"}]
    assert engine.generate([{"role": "user", "content": content}], **SHORT) == expected["answer"]


@pytest.mark.parametrize("way", [pickled, saved, copy.deepcopy], ids=lambda way: way.__name__)
def test_a_video_in_the_middle_goes_on(used, way):
    video = noise_video(11)[0]
    with torch.no_grad():
        state = used.model.start_video()
        state.append(video[:6])
        again = way(state)
        for one in (state, again):
            one.append(video[6:])
        assert torch.equal(again.features().pooler_output[0], state.features().pooler_output[0])
        assert torch.equal(way(state.features()).local_features[0], state.features().local_features[0])
