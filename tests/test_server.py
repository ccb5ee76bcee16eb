"""The server over a tiny index and an untrained generator. Whether real clients are content: see docs/serving.md."""

import base64
import concurrent.futures
import http.client
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image
from starlette.testclient import TestClient

from clip_train import fetch as fetch_module
from clip_train import inference
from clip_train.embed import embed
from clip_train.fit import FitConfig
from clip_train.model import Clip
from clip_train.settings import UserError
from clip_train.store import EmbeddingStore
from diffusion.decoder import DecoderConfig
from diffusion.generate import Generator
from diffusion.prior import PriorConfig
from diffusion.provenance import read_provenance
from diffusion.train_decoder import train_decoder
from diffusion.train_prior import train_prior
from retrieval import batcher, changes
from retrieval import server as server_module
from retrieval.asked import Refused
from retrieval.clip_api import leads_somewhere
from retrieval.connection import Connection
from retrieval.index import build_index
from retrieval.search import Searcher
from retrieval.served import thumbnail
from retrieval.server import ServeConfig, create_app, listen, named, read_token

HERE = "http://127.0.0.1"
FEW = FitConfig(steps=1, batch_size=4, precision="fp32")
DECODER = DecoderConfig(image_size=8, widths=(16, 32), blocks=(1, 1), attention=(2,), head_width=16, cond_width=32)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Ten pictures, their CLIP, embeddings and index, a prior and a decoder."""
    root = tmp_path_factory.mktemp("world")
    tiny.shards(root / "shards", n=10, per_shard=4)
    tiny.clip(root / "clip")
    embed(root / "shards", root / "clip", root / "emb")
    build_index(root / "emb", root / "index")
    train_prior(root / "emb", root / "prior", PriorConfig(width=32, depth=1, heads=2), FEW, device="cpu")
    train_decoder(root / "shards", root / "clip", root / "decoder", DECODER, FEW, device="cpu")
    return root


@pytest.fixture(scope="module")
def clip(world):
    return Clip.load(world / "clip")


@pytest.fixture(scope="module")
def client(world):
    """A server with two indexes and a generator."""
    indexes = {"tiny": Searcher.open(world / "index"), "again": Searcher.open(world / "index")}
    generator = Generator.open(world / "decoder", world / "prior")
    app = create_app(indexes, generator=generator, config=ServeConfig(precision="fp32"))
    with TestClient(app, base_url=HERE) as made:
        yield made


def serve(index, **config):
    config = ServeConfig(**{"precision": "fp32", **config})
    return TestClient(create_app({"tiny": Searcher.open(index)}, config=config), base_url=HERE)


def in_base64(data):
    return base64.b64encode(data).decode()


def knn(client, **fields):
    """As ClipClient sends it: JSON without a content type."""
    asked = {"modality": "image", "num_images": 3, "num_result_ids": 5, "indice_name": "tiny"} | fields
    return client.post("/knn-service", content=json.dumps(asked).encode())


def said(answer):
    return answer.json()["error"]["message"]


# clip-retrieval's API


def test_rows_come_in_the_order_of_their_cosines_and_the_first_ones_with_metadata_and_picture(client, world, clip):
    truth = clip.encode_text(["picture number 3"]).numpy()[0] @ EmbeddingStore.open(world / "emb").image().T
    rows = knn(client, text="picture number 3").json()
    assert [row["id"] for row in rows] == np.argsort(-truth)[:5].tolist()
    np.testing.assert_allclose([row["similarity"] for row in rows], -np.sort(-truth)[:5], atol=1e-5)
    for row in rows[:3]:
        assert row["image_path"] == f"s{row['id']:03d}" and row["caption"] == f"picture number {row['id']}"
        assert base64.b64decode(row["image"]) == tiny.picture(row["id"])  # the very file in the tar
    assert [set(row) for row in rows[3:]] == [{"id", "similarity"}] * 2


def test_a_picture_and_an_embedding_find_themselves(client, world):
    (row,) = knn(client, image=in_base64(tiny.picture(7)), num_images=1, num_result_ids=1).json()
    assert row["id"] == 7 and row["similarity"] == pytest.approx(1, abs=2e-3)
    vector = EmbeddingStore.open(world / "emb").text([4])[0] * 3
    (row,) = knn(client, embedding_input=vector.tolist(), modality="text", num_images=1, num_result_ids=1).json()
    assert row["id"] == 4 and row["similarity"] == pytest.approx(1, abs=2e-3)


def test_text_goes_before_picture_before_address_before_embedding(client):
    alone = knn(client, text="a").json()
    many = {"image": in_base64(tiny.picture(1)), "image_url": "http://x.example/", "embedding_input": [1.0] * 32}
    assert knn(client, text="a", **many).json() == alone
    assert knn(client, text="", **many).json() == knn(client, **many).json() != alone
    assert knn(client, **many).json()[0]["id"] == 1


@pytest.mark.parametrize(
    "kind", [None, "text/plain;charset=UTF-8", "application/json", "application/x-www-form-urlencoded"]
)
def test_the_body_is_json_whatever_its_content_type_says(client, kind):
    body = json.dumps({"text": "a", "num_images": 1, "aesthetic_score": "", "use_mclip": False, "indice_name": None})
    headers = {} if kind is None else {"content-type": kind}
    answer = client.post("/knn-service", content=body.encode(), headers=headers)
    assert answer.status_code == 200 and len(answer.json()) == 1


def test_what_clip_client_sends_by_default_is_understood(client):
    sent = {"deduplicate": True, "use_safety_model": True, "use_violence_detector": True, "use_mclip": False}
    sent |= {"aesthetic_score": 9, "aesthetic_weight": 0.5, "image": None, "image_url": None, "embedding_input": None}
    assert knn(client, text="a", num_images=40, num_result_ids=40, **sent).status_code == 200


def test_copies_are_left_out_if_that_is_asked_for(tmp_path):
    rows = tiny.unit_rows(6, 32)
    rows[3] = rows[0]
    tiny.store(tmp_path / "emb", rows)
    build_index(tmp_path / "emb", tmp_path / "index")
    with serve(tmp_path / "index") as client:
        asked = {"embedding_input": rows[0].tolist(), "num_images": 0, "num_result_ids": 6}
        all_rows = [row["id"] for row in knn(client, **asked).json()]
        distinct = [row["id"] for row in knn(client, deduplicate=True, **asked).json()]
    assert set(all_rows[:2]) == {0, 3} and len(all_rows) == 6
    assert distinct == all_rows[:1] + all_rows[2:]


@pytest.mark.parametrize(
    "fields, status, words",
    [
        ({"indice_name": "none"}, 404, "there is no index 'none' here; there are: tiny, again"),
        ({"text": None}, 400, "one of text, image, image_url and embedding_input is needed"),
        ({"text": 5}, 400, "text must be a text"),
        ({"modality": "sound"}, 400, "modality 'sound' must be one of: image, text"),
        ({"num_images": -1}, 400, "num_images -1 must be between 0 and 10000"),
        ({"num_images": 1001, "num_result_ids": 1001}, 400, "num_images 1001 must be at most 1000"),
        ({"num_result_ids": 10**9}, 400, "num_result_ids 1000000000 must be between"),
        ({"num_images": "3.5"}, 400, "num_images must be a whole number"),
        ({"text": None, "image": "AAAA"}, 400, "the picture cannot be read"),
        ({"text": None, "image": "?"}, 400, "base64"),
        ({"text": None, "embedding_input": [1.0]}, 400, "embedding_input must be 32 numbers, not 1"),
        ({"text": None, "embedding_input": [0.0] * 32}, 400, "points nowhere"),
        ({"text": None, "image_url": "http://example.com/a.png"}, 403, "addresses of pictures are not fetched here"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_in_json(client, fields, status, words):
    answer = knn(client, **{"text": "a", **fields})
    assert answer.status_code == status and words in said(answer)


def test_a_body_that_is_no_json_is_refused(client):
    for body in (b"", b"{", b'{"embedding_input": [NaN]}', b"[1]", b"\xff"):
        assert client.post("/knn-service", content=body).status_code == 400


def test_ids_are_answered_with_their_metadata(client):
    asked = json.dumps({"ids": [5, 0], "indice_name": "tiny"}).encode()
    five, zero = client.post("/metadata", content=asked).json()
    assert (five["id"], zero["id"]) == (5, 0)
    assert five["metadata"]["label"] == "label 2" and five["metadata"]["source.page"] == 5
    assert base64.b64decode(zero["metadata"]["image"]) == tiny.picture(0)
    assert client.post("/metadata", content=b'{"ids": [], "indice_name": "tiny"}').json() == []
    assert client.post("/metadata", content=b'{"ids": [10], "indice_name": "tiny"}').status_code == 404
    assert client.post("/metadata", content=b'{"ids": ["a"]}').status_code == 400


def test_clip_front_reads_the_backend_without_a_slash_and_the_indexes(client):
    assert client.get("/config.json").json() == {"defaultBackend": HERE, "defaultIndex": "tiny", "urlColumn": "url"}
    assert client.get("/indices-list").json() == ["tiny", "again"]


@pytest.mark.parametrize(
    "url, public",
    [
        ("https://images.org/a.jpg", True),
        ("http://93.184.216.34/a.jpg", True),
        ("http://localhost/a.jpg", False),
        ("http://127.0.0.1:8000/a.jpg", False),
        ("http://192.168.0.3/a.jpg", False),
        ("http://cat.example/a.jpg", False),
        ("http://www.example.org/a.jpg", False),
        ("http://nas.lan/a.jpg", False),
        ("http://server/a.jpg", False),
        ("file:///a.jpg", False),
        ("a.jpg", False),
        ("http://[", False),
        (None, False),
        (3, False),
    ],
)
def test_an_address_that_leads_nowhere_is_seen_by_its_looks(url, public):
    assert leads_somewhere(url) is public


def test_addresses_are_fetched_only_if_allowed_and_only_public_ones(world, monkeypatch):
    asked = []
    monkeypatch.setattr(fetch_module, "_get", lambda url, *rest: asked.append(url) or tiny.picture(2))
    with serve(world / "index", image_urls=True) as client:
        assert knn(client, image_url="https://images.org/a.png").json()[0]["id"] == 2
        monkeypatch.undo()
        for url in ("http://127.0.0.1/a.png", "http://[::1]/", "http://2130706433/", "http://169.254.169.254/latest/"):
            answer = knn(client, image_url=url)
            assert answer.status_code == 400
            assert said(answer) == "the picture cannot be fetched: its host is not known, or not public"
        unknown = socket.gaierror(socket.EAI_NONAME, "unknown")
        with monkeypatch.context() as patched:
            patched.setattr(socket, "getaddrinfo", lambda *_, **__: (_ for _ in ()).throw(unknown))
            assert said(knn(client, image_url="http://inner.name/")) == said(answer)  # so names cannot be told apart
        assert "only http and https" in said(knn(client, image_url="file:///etc/passwd"))
    assert asked == ["https://images.org/a.png"]


# OpenAI's API


def test_embeddings_are_those_of_the_clip_as_numbers_or_as_bytes(client, clip):
    texts = ["a red fox", "b"]
    truth = clip.encode_text(texts).numpy()
    answer = client.post("/v1/embeddings", json={"model": "tiny", "input": texts}).json()
    np.testing.assert_allclose([one["embedding"] for one in answer["data"]], truth, atol=1e-6)
    assert [one["index"] for one in answer["data"]] == [0, 1] and answer["model"] == "tiny"
    assert answer["usage"]["prompt_tokens"] == 5 + 3  # start, words, end
    one = {"model": "tiny", "input": texts[0], "encoding_format": "base64"}
    packed = client.post("/v1/embeddings", json=one).json()["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(packed), "<f4"), truth[0], atol=1e-6)


def test_pictures_as_data_addresses_are_embedded_beside_texts(client, world, clip):
    picture = f"data:image/png;base64,{in_base64(tiny.picture(3))}"
    data = client.post("/v1/embeddings", json={"model": "tiny", "input": ["a", picture]}).json()["data"]
    np.testing.assert_allclose(data[1]["embedding"], EmbeddingStore.open(world / "emb").image([3])[0], atol=2e-3)
    np.testing.assert_allclose(data[0]["embedding"], clip.encode_text(["a"]).numpy()[0], atol=1e-6)


def test_more_texts_than_a_batch_keep_their_order(client, clip):
    texts = [f"text {n}" for n in range(150)]
    data = client.post("/v1/embeddings", json={"model": "tiny", "input": texts}).json()["data"]
    np.testing.assert_allclose([one["embedding"] for one in data], clip.encode_text(texts).numpy(), atol=1e-5)


def test_a_precision_that_is_chosen_by_the_server_moves_no_row_further_than_a_cosine_of_9999(world, clip, monkeypatch):
    monkeypatch.setattr(inference, "resolved_precision", lambda *_: "bf16")  # as on hardware that is fast at it
    texts = [f"picture number {n}" for n in range(9)]
    with serve(world / "index", precision="auto") as client:
        assert client.app.state.hall.indexes["tiny"].encoder.clip.precision["text"] == "bf16"
        data = client.post("/v1/embeddings", json={"model": "tiny", "input": texts}).json()["data"]
    rows, truth = np.array([one["embedding"] for one in data]), clip.encode_text(texts).numpy()
    assert (np.sum(rows * truth, axis=1) > 0.9999).all() and np.abs(rows - truth).max() > 1e-5


@pytest.mark.parametrize(
    "fields, status, words",
    [
        ({"input": []}, 400, "input must be a text or a list of texts"),
        ({"input": [1, 2]}, 400, "tokens of another model"),
        ({"input": "a", "model": "text-embedding-3-small"}, 404, "there are: tiny, again"),
        ({"input": "a", "dimensions": 16}, 400, "dimensions can only be 32"),
        ({"input": "a", "encoding_format": "hex"}, 400, "must be one of: float, base64"),
        ({"input": ["a"] * 2049}, 400, "2048 are the most"),
    ],
)
def test_embeddings_that_cannot_be_made_are_refused(client, fields, status, words):
    answer = client.post("/v1/embeddings", json={"model": "tiny", **fields})
    assert answer.status_code == status and words in said(answer)


def test_models_are_the_indexes_and_the_generator(client):
    models = client.get("/v1/models").json()
    assert models["object"] == "list" and [m["id"] for m in models["data"]] == ["tiny", "again", "unclip"]


def opened(file):
    return Image.open(io.BytesIO(base64.b64decode(file)))


def test_a_prompt_makes_pictures_that_carry_their_record(client, tmp_path):
    asked = {"prompt": "picture number 1", "n": 2, "seed": 5, "size": "1024x1024", "response_format": "b64_json"}
    answer = client.post("/v1/images/generations", json=asked).json()
    assert answer["size"] == "8x8" and set(answer["data"][0]) == {"b64_json"} and len(answer["data"]) == 2
    (tmp_path / "made.png").write_bytes(base64.b64decode(answer["data"][1]["b64_json"]))
    record = read_provenance(tmp_path / "made.png")
    assert record["caption"] == "picture number 1" and record["seed"] == 6
    again = client.post("/v1/images/generations", json=asked).json()
    assert again["data"] == answer["data"]
    both = client.post("/v1/images/generations", json={"prompt": "a"}).json()["data"][0]
    assert both["url"] == f"data:image/png;base64,{both['b64_json']}" and opened(both["b64_json"]).size == (8, 8)


def test_a_picture_is_varied_and_edited(client):
    files = {"image": ("a.png", tiny.picture(3), "image/png")}
    varied = client.post("/v1/images/variations", files=files, data={"n": "2", "response_format": "url"}).json()["data"]
    assert [set(one) for one in varied] == [{"url"}] * 2 and varied[0] != varied[1]
    edited = client.post("/v1/images/edits", files=files, data={"prompt": "one of many"})
    assert opened(edited.json()["data"][0]["b64_json"]).size == (8, 8)
    many = [("image[]", ("a.png", tiny.picture(3), "image/png"))]  # as the openai package sends a list
    assert client.post("/v1/images/edits", files=many, data={"prompt": "one of many"}).status_code == 200
    answer = client.post("/v1/images/edits", files=2 * many, data={"prompt": "one of many"})
    assert answer.status_code == 400 and "the form has 2 pictures" in said(answer)


@pytest.mark.parametrize(
    "path, sent, words",
    [
        ("generations", {"json": {}}, "prompt is missing"),
        ("generations", {"json": {"prompt": "a", "n": 9}}, "n 9 must be between 1 and 8"),
        ("generations", {"json": {"prompt": "a", "size": "large"}}, "size 'large' must be auto or WIDTHxHEIGHT"),
        ("generations", {"json": {"prompt": "a", "response_format": "tiff"}}, "response_format 'tiff'"),
        ("variations", {"json": {}}, "must be multipart/form-data"),
        ("variations", {"files": {"other": b"x"}}, "no file named image"),
        ("variations", {"files": {"image": b"x"}}, "the picture cannot be read"),
        ("edits", {"files": {"image": tiny.picture(1), "mask": b"x"}, "data": {"prompt": "a"}}, "a mask"),
        ("edits", {"files": {"image": tiny.picture(1)}}, "prompt is missing"),
    ],
)
def test_pictures_that_cannot_be_drawn_are_refused(client, path, sent, words):
    answer = client.post(f"/v1/images/{path}", **sent)
    assert answer.status_code == 400 and words in said(answer)


def test_a_generator_without_a_prior_says_that_it_draws_no_prompts(world):
    app = create_app({"tiny": Searcher.open(world / "index")}, generator=Generator.open(world / "decoder"))
    with TestClient(app, base_url=HERE) as client:
        assert client.get("/api/info").json()["generator"]["prompts"] is False
        for answer in (generate(client, prompt="a"), client.post("/v1/images/generations", json={"prompt": "a"})):
            assert answer.status_code == 400 and "start it with --prior" in said(answer)
        edit = generate(client, mode="edit", text="a", **{"from": [{"index": "tiny", "row": 1}]})
        assert edit.status_code == 400 and "has no CLIP to read the text with" in said(edit)
        assert generate(client, count=1, **{"from": [{"index": "tiny", "row": 1}]}).status_code == 200


def test_without_a_generator_there_are_no_pictures(world):
    with serve(world / "index") as client:
        assert client.post("/v1/images/generations", json={"prompt": "a"}).status_code == 404
        assert "no generator" in said(client.post("/api/generate", json={"prompt": "a"}))
        assert client.get("/api/info").json()["generator"] is None


# The page's API


def search(client, *terms, **fields):
    return client.post("/api/search", json={"terms": list(terms), **fields})


def term(kind, value, weight=1.0):
    return {"kind": kind, "value": value, "weight": weight}


def test_info_says_what_there_is(client):
    info = client.get("/api/info").json()
    assert [(i["name"], i["rows"], i["dim"]) for i in info["indexes"]] == [("tiny", 10, 32), ("again", 10, 32)]
    assert "label" in info["indexes"][0]["columns"] and info["indexes"][0]["calibrated"] is False
    assert info["generator"] == {"size": 8, "steps": 16, "guidance": 2.0, "max_count": 8, "prompts": True}
    assert info["image_urls"] is False and info["limits"] == {"upload_bytes": 16_000_000}


def test_terms_of_all_kinds_are_added_and_subtracted(client, world, clip):
    store = EmbeddingStore.open(world / "emb")
    vector = np.eye(32)[3]
    terms = [term("text", "one of many"), term("key", "s004", 2), term("image", in_base64(tiny.picture(2)), -0.5)]
    hits = search(client, *terms, term("vector", vector.tolist()), k=10).json()["hits"]
    sums = clip.encode_text(["one of many"]).numpy()[0] + 2 * store.image([4])[0] - 0.5 * store.image([2])[0] + vector
    truth = store.image() @ (sums / np.linalg.norm(sums))
    assert [hit["row"] for hit in hits] == np.argsort(-truth).tolist()
    np.testing.assert_allclose([hit["score"] for hit in hits], -np.sort(-truth), atol=2e-3)
    first = hits[0]
    assert first["key"] == f"s{first['row']:03d}" and first["picture"] == f"/api/picture/tiny/{first['row']}"
    assert first["meta"]["label"] == f"label {first['row'] // 2}" and first["probability"] is None


def test_filters_and_distinctness_reach_the_search(client):
    hits = search(client, term("text", "a"), where="label == 'label 2'").json()["hits"]
    assert sorted(hit["row"] for hit in hits) == [4, 5]
    assert "label_" in said(search(client, term("text", "a"), where="label_ == 1"))
    assert len(search(client, term("text", "a"), distinct=0.999999, k=3).json()["hits"]) == 3


@pytest.mark.parametrize(
    "terms, words",
    [
        ([], "nothing to search for"),
        ([3], "must be an object with kind and value"),
        ([term("text", "a")] * 17, "16 are the most"),
        ([term("sound", "a")], "kind 'sound' must be one of"),
        ([term("text", "")], "a term of kind text has no value"),
        ([term("text", "a", 0)], "must be a number other than 0"),
        ([term("text", "a"), term("text", "a", -1)], "cancel out"),
        ([term("key", "nobody")], "no sample with the key"),
        ([term("vector", [1, 2])], "value must be 32 numbers"),
        ([term("image", "AAAA")], "the picture cannot be read"),
    ],
)
def test_terms_that_mean_nothing_are_refused(client, terms, words):
    answer = search(client, *terms)
    assert answer.status_code == 400 and words in said(answer)


def test_pictures_come_from_the_tar_whole_or_small_and_are_not_sent_twice(client):
    whole = client.get("/api/picture/tiny/6")
    assert whole.content == tiny.picture(6) and whole.headers["content-type"] == "image/png"
    again = client.get("/api/picture/tiny/6", headers={"If-None-Match": whole.headers["etag"]})
    assert again.status_code == 304 and not again.content
    small = client.get("/api/picture/tiny/6?side=16")
    assert Image.open(io.BytesIO(small.content)).size == (16, 16) and small.headers["etag"] != whole.headers["etag"]
    for path, status in (("tiny/10", 404), ("tiny/x", 404), ("none/1", 404), ("tiny/1?side=99999", 400)):
        assert client.get(f"/api/picture/{path}").status_code == status


def test_details_say_where_a_row_comes_from(client, world):
    details = client.get("/api/details/tiny/5").json()
    assert details["key"] == "s005" and details["captions"] == ["picture number 5", "one of many"]
    assert details["meta"]["label"] == "label 2" and "captions" not in details["meta"]
    made = details["provenance"]
    assert made["embeddings"] == EmbeddingStore.open(world / "emb").fingerprint and made["shard"] == "000001.tar"
    assert made["clip"] == Clip.load(world / "clip").fingerprint and made["index"].startswith("sha256:")


def generate(client, **fields):
    return client.post("/api/generate", json={"steps": 3, **fields})


def test_the_page_generates_varies_interpolates_and_edits(client):
    rows = [{"index": "tiny", "row": 1}, {"index": None, "row": 2}]
    for fields, count in [
        ({"prompt": "a", "count": 2, "strip": True}, 2),
        ({"mode": "vary", "from": rows[:1], "count": 3}, 3),
        ({"mode": "interpolate", "from": rows, "count": 3}, 3),
        ({"mode": "edit", "from": rows[:1], "text": "one of many", "count": 2, "seed": 7}, 2),
        ({"from": rows[:1], "count": 1}, 1),
    ]:
        made = generate(client, **fields).json()
        assert len(made["pictures"]) == count and made["ms"] > 0
        assert opened(made["pictures"][0]["png"]).size == (8, 8)
        assert made["pictures"][0]["provenance"]["sampling"]["steps"] == 3
        assert bool(made["strip"]) == ("strip" in fields)
    assert opened(generate(client, prompt="a", strip=True, count=1).json()["strip"][0]).size == (8, 8)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({}, "generate needs a prompt"),
        ({"mode": "vary"}, "vary needs 1 row in from, not 0"),
        ({"mode": "interpolate", "from": [{"index": "tiny", "row": 1}]}, "interpolate needs 2 rows"),
        ({"mode": "edit", "from": [{"index": "tiny", "row": 1}]}, "edit needs text"),
        ({"mode": "vary", "from": [{"index": "tiny"}]}, "an object with index and row"),
        ({"mode": "vary", "from": [{"index": "tiny", "row": 10}]}, "has no row 10"),
        ({"mode": "interpolate", "count": 1}, "count 1 must be between 2 and 8"),
        ({"prompt": "a", "steps": 0}, "steps 0 must be between 1 and 100"),
        ({"prompt": "a", "count": 9}, "count 9 must be between 1 and 8"),
        ({"prompt": "a", "guidance": -1}, "guidance -1.0 must be between"),
    ],
)
def test_pictures_the_page_cannot_have_are_refused(client, fields, words):
    answer = generate(client, **fields)
    assert answer.status_code in (400, 404) and words in said(answer)


def test_the_page_is_served_with_a_strict_policy_and_needs_no_token(world):
    with serve(world / "index", token="a-good-token") as client:
        page = client.get("/")
        policy = page.headers["content-security-policy"]
        assert page.status_code == 200 and "default-src 'none'" in policy and "unsafe" not in policy
        assert client.get("/healthz").json()["status"] == "ok" and client.head("/healthz").status_code == 200
        for path in ("/api/info", "/metrics", "/indices-list", "/v1/models"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"Authorization": "Bearer a-good-token"}).status_code == 200


# The server itself


def test_metrics_count_requests_batches_and_rows(client):
    knn(client, text="a")
    text = client.get("/metrics").text
    assert 'unclip_requests_total{route="/knn-service",status="200"}' in text
    assert 'unclip_index_rows{index="tiny"} 10.0' in text
    for name in ("unclip_batch_size_bucket", "unclip_queue_length", "unclip_request_seconds_bucket"):
        assert name in text
    client.get("/made-up/path")
    assert "made-up" not in client.get("/metrics").text


def test_unknown_paths_and_methods_are_refused_in_json(client):
    assert client.get("/nothing").status_code == 404 and said(client.get("/nothing")) == "there is nothing here"
    assert client.delete("/knn-service").status_code == 405


def test_a_full_generator_says_when_to_come_back_and_recovers(world, monkeypatch):
    gate, begun = threading.Event(), threading.Event()
    generator = Generator.open(world / "decoder", world / "prior")
    draw = generator.from_captions
    monkeypatch.setattr(generator, "from_captions", lambda *a, **k: begun.set() or gate.wait(10) and draw(*a, **k))
    config = ServeConfig(draw_queue=1)
    with TestClient(create_app({"t": Searcher.open(world / "index")}, generator=generator, config=config), HERE) as c:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            ask = lambda: c.post("/v1/images/generations", json={"prompt": "a"})  # noqa: E731
            waiting = [pool.submit(ask)]
            assert begun.wait(10)
            waiting.append(pool.submit(ask))
            until(lambda: 'unclip_queue_length{queue="generator"} 1.0' in c.get("/metrics").text)
            full = ask()
            assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
            assert knn(c, text="a", indice_name="t").status_code == 200  # searching goes on
            gate.set()
            assert [job.result().status_code for job in waiting] == [200, 200]
        assert ask().status_code == 200


def until(true, seconds=10):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_concurrent_texts_are_encoded_and_searched_together(world):
    searcher = Searcher.open(world / "index")
    app = create_app({"tiny": searcher}, config=ServeConfig(precision="fp32"))
    with TestClient(app, base_url=HERE) as client:
        encoder = client.app.state.hall.indexes["tiny"].encoder
        gate, seen, encode = threading.Event(), [], encoder.clip.encode_text

        def slow(captions):
            seen.append(len(captions))
            gate.wait(10)
            return encode(captions)

        encoder.clip = type("Slow", (), {"encode_text": staticmethod(slow)})()
        with concurrent.futures.ThreadPoolExecutor(9) as pool:
            first = pool.submit(knn, client, text="first")
            until(lambda: seen)
            others = [pool.submit(knn, client, text=f"text {n}") for n in range(8)]
            until(lambda: len(encoder._texts) == 8)
            gate.set()
            assert all(job.result().status_code == 200 for job in [first, *others])
        assert seen == [1, 8]
        expected = [hit.row for hit in searcher.text(["text 5"], k=5)[0]]
        assert [row["id"] for row in others[5].result().json()] == expected


def test_added_deleted_and_compacted_rows_are_seen_without_a_failed_request(world, tmp_path):
    for name in ("clip", "emb", "index", "shards"):
        shutil.copytree(world / name, tmp_path / name)
    tiny_more(tmp_path / "more")
    embed(tmp_path / "more", tmp_path / "clip", tmp_path / "emb2")
    stop, statuses = threading.Event(), []
    with serve(tmp_path / "index", reload_seconds=0.02) as client:

        def keep_asking():
            end = time.monotonic() + 30  # or a failure below would never come to light
            while not stop.is_set() and time.monotonic() < end:
                statuses.append(knn(client, text="a", num_images=20, num_result_ids=20).status_code)

        def rows():
            return client.get("/api/info").json()["indexes"][0]["rows"]

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            asking = [pool.submit(keep_asking) for _ in range(2)]
            changes.add(tmp_path / "index", tmp_path / "emb2")
            until(lambda: rows() == 13)
            found = search(client, term("image", in_base64(tiny.picture(101))), k=1).json()["hits"][0]
            assert found["key"] == "m001" and client.get(found["picture"]).content == tiny.picture(101)
            etag = client.get("/api/picture/tiny/0").headers["etag"]
            changes.delete(tmp_path / "index", ["s000", "m002"])
            until(lambda: rows() == 11)
            assert client.get("/api/picture/tiny/0").status_code == 404
            changes.compact(tmp_path / "index")
            until(lambda: client.get("/api/picture/tiny/0").status_code == 200)
            now = client.get("/api/picture/tiny/0", headers={"If-None-Match": etag})
            assert now.content == tiny.picture(1)  # row 0 is another sample now, and the browser is told so
            stop.set()
            for job in asking:
                job.result()
    assert len(statuses) > 5 and set(statuses) == {200}


def test_a_key_beside_a_row_means_the_sample_whatever_row_it_has_by_now(world, tmp_path):
    shutil.copytree(world / "index", tmp_path / "index")
    changes.delete(tmp_path / "index", ["s000"])
    generator = Generator.open(world / "decoder", world / "prior")
    index = Searcher.open(tmp_path / "index", world / "clip")
    app = create_app({"tiny": index}, generator=generator, config=ServeConfig(reload_seconds=60))
    with TestClient(app, base_url=HERE) as client:
        hit = search(client, term("key", "s005"), k=1).json()["hits"][0]
        seen = {"index": "tiny", "row": hit["row"], "key": hit["key"]}
        drawn = generate(client, mode="vary", count=1, **{"from": [seen]}).json()["pictures"]
        for compacted in (False, True):
            details = client.get("/api/details/tiny/5?key=s005").json()
            assert (details["row"], details["key"]) == (5 - compacted, "s005")
            again = generate(client, mode="vary", count=1, **{"from": [seen]}).json()["pictures"]
            assert again[0]["provenance"]["embedding"] == drawn[0]["provenance"]["embedding"]
            if not compacted:
                changes.compact(tmp_path / "index", embeddings=[world / "emb"])
                assert index.refresh()
        assert client.get("/api/details/tiny/5").json()["key"] == "s006"  # a row alone is taken as it is
        for ask in (
            client.get("/api/details/tiny/0?key=s000"),
            client.get("/api/picture/tiny/0?side=16&key=s000"),
            generate(client, mode="vary", **{"from": [{**seen, "key": "s000"}]}),
        ):
            assert ask.status_code == 409 and "'s000' is gone" in said(ask)


def test_pictures_go_by_their_key_too(client):
    assert client.get("/api/picture/tiny/3?key=s006").content == tiny.picture(6)
    etags = {client.get(f"/api/picture/tiny/3{key}").headers["etag"] for key in ("", "?key=s006", "?key=s003")}
    assert len(etags) == 3


def test_a_fault_of_the_server_is_no_fault_of_the_client_and_tells_no_path(client, monkeypatch, caplog):
    def damaged(self, row):
        raise UserError("/srv/index/metadata/metadata_0.parquet cannot be read; make it again: unclip index")

    monkeypatch.setattr(type(client.app.state.hall.indexes["tiny"].searcher.index.table), "row", damaged)
    for answer in (search(client, term("text", "a")), knn(client, text="a")):
        assert answer.status_code == 500 and said(answer) == "the server cannot answer this; its log says why"
    assert "/srv/index/metadata/metadata_0.parquet" in caplog.text


def test_work_whose_turn_comes_too_late_is_told_to_come_back(world, monkeypatch):
    """The Door's 504 comes `seconds` after a request, so what waits must have been refused before."""
    config = ServeConfig(precision="fp32")
    with TestClient(create_app({"tiny": Searcher.open(world / "index")}, config=config), base_url=HERE) as client:
        encoder = client.app.state.hall.indexes["tiny"].encoder
        gate, begun, encode, now = threading.Event(), threading.Event(), encoder.clip.encode_text, time.monotonic
        slow = lambda captions: begun.set() or gate.wait(10) and encode(captions)  # noqa: E731
        encoder.clip = type("Slow", (), {"encode_text": staticmethod(slow)})()
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            first = pool.submit(knn, client, text="first")
            assert begun.wait(10)
            second = pool.submit(knn, client, text="second")
            until(lambda: len(encoder._texts) == 1)
            later = type("Later", (), {"monotonic": staticmethod(lambda: now() + 0.95 * config.seconds)})
            monkeypatch.setattr(batcher, "time", later)
            gate.set()
            assert first.result().status_code == 200
            late = second.result()
    assert late.status_code == 429 and late.headers["retry-after"] == "1"
    assert late.json()["error"]["type"] == "requests"


def test_the_server_waits_for_the_slowest_answers_that_it_allows(client, monkeypatch):
    import uvicorn

    made = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: made.append(self.config))
    hall = client.app.state.hall
    for seconds, draw_seconds, grace in ((30, 300, 300), (0.3, 0.2, 1)):
        config = ServeConfig(seconds=seconds, draw_seconds=draw_seconds)
        monkeypatch.setattr(hall, "config", config)
        server_module.run(client.app, None)
        assert made[-1].timeout_graceful_shutdown == grace
    assert made[-1].http is Connection and made[-1].ws == "none"


def tiny_more(folder):
    from dataclasses import replace

    from clip_train.shards import write_shards

    write_shards([replace(s, image=tiny.picture(100 + i)) for i, s in enumerate(tiny.samples(3, prefix="m"))], folder)


def test_an_index_without_its_clip_answers_vectors_and_says_so_for_texts(world, tmp_path, caplog):
    shutil.copytree(world / "index", tmp_path / "index")
    with serve(tmp_path / "index") as client:
        assert "only vectors and keys can be searched for" in caplog.text
        answer = knn(client, text="a")
        assert (
            answer.status_code == 400 and "served without its CLIP" in said(answer) and str(tmp_path) not in answer.text
        )
        rows = knn(client, embedding_input=[1.0] * 32).json()
        assert len(rows) == 5 and "image" not in rows[0]  # nor are the shards where they were
        assert client.get("/v1/models").json()["data"] == []


def test_a_large_picture_is_made_smaller_and_a_damaged_one_is_none():
    file = io.BytesIO()
    Image.effect_noise((900, 600), 50).convert("RGB").save(file, "PNG")
    data, kind = thumbnail(file.getvalue(), 512)
    assert kind == "image/jpeg" and Image.open(io.BytesIO(data)).size == (512, 341)
    assert thumbnail(b"not a picture", 512) is None


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"token": "short"}, "at least 8 printable"),
        ({"token": "with a\nline break"}, "printable"),
        ({"origins": ("example.com",)}, "is not an origin"),
        ({"queue": 0}, "queue 0 must be a number above 0"),
        ({"seconds": float("nan")}, "seconds nan must be a number above 0"),
        ({"draw_seconds": float("inf")}, "draw_seconds inf must be a number above 0"),
        ({"port": 70_000}, "below 65536"),
        ({"precision": "int8"}, "precision 'int8' must be"),
    ],
)
def test_wrong_settings_are_one_line(wrong, words):
    with pytest.raises(UserError, match=words):
        ServeConfig(**wrong)


def test_a_page_from_elsewhere_is_allowed_only_where_that_is_safe():
    assert ServeConfig().all_origins == ()
    assert ServeConfig(host="0.0.0.0").all_origins == ()  # a page could read for its author what he cannot reach
    for host in ("0.0.0.0", "127.0.0.1"):
        assert ServeConfig(host=host, token="12345678").all_origins == ("*",)
    assert ServeConfig(host="0.0.0.0", origins=("https://a.example",)).all_origins == ("https://a.example",)
    assert "12345678" not in repr(ServeConfig(token="12345678"))


def test_a_host_is_what_it_resolves_to(monkeypatch):
    known = {"vm": ["127.0.1.1"], "six": ["::1"], "both": ["::1", "192.168.1.5"], "127.1": ["127.0.0.1"]}

    def resolve(host, port, **how):
        if host not in known:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        family = {True: socket.AF_INET6, False: socket.AF_INET}
        return [(family[":" in a], socket.SOCK_STREAM, 6, "", (a, port)) for a in known[host]]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert [ServeConfig(host=host).loopback for host in known] == [True, True, False, True]
    assert ServeConfig(host="six").address == (socket.AF_INET6, "::1")
    assert ServeConfig(host="both").address == (socket.AF_INET, "192.168.1.5")
    with pytest.raises(UserError, match="cannot listen on nowhere: this machine knows no such host"):
        listen(ServeConfig(host="nowhere"))


def test_a_token_file_must_be_there_hold_a_token_and_be_private(tmp_path):
    path = tmp_path / "token"
    with pytest.raises(UserError, match="cannot be read"):
        read_token(path)
    path.write_text("\n")
    path.chmod(0o600)
    with pytest.raises(UserError, match="is empty; make a token"):
        read_token(path)
    path.write_text("a-good-token\n")
    assert read_token(path) == "a-good-token"
    path.chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        read_token(path)


def test_nothing_to_serve_a_bad_name_and_a_taken_port_are_one_line(world):
    with pytest.raises(UserError, match="nothing to serve"):
        create_app({})
    for name in ("a/b", ".."):
        with pytest.raises(UserError, match="no name for an index"):
            create_app({name: Searcher.open(world / "index")})
    with pytest.raises(UserError, match="'my index' is no name .* --index NAME=FOLDER"):
        create_app({"my index": Searcher.open(world / "index")})
    sock = listen(ServeConfig(port=0))
    assert sock.proto == socket.IPPROTO_TCP  # else asyncio leaves Nagle's algorithm on: 40 ms an answer
    with pytest.raises(UserError, match="cannot listen on 127.0.0.1:.*in use"):
        listen(ServeConfig(port=sock.getsockname()[1]))
    sock.close()


def test_indexes_go_by_a_given_name_or_by_that_of_their_folder(tmp_path):
    (tmp_path / "a=b").mkdir()
    given = ["photos=x/index", "y/drawings/", str(tmp_path / "a=b")]
    assert named(given) == {
        "photos": Path("x/index"), "drawings": Path("y/drawings"), "a=b": tmp_path / "a=b"
    }  # fmt: skip
    with pytest.raises(UserError, match="two indexes are called index"):
        named(["a/index", "b/index"])


def test_the_command_line_says_where_it_serves_and_warns_when_anybody_may_ask(monkeypatch, tmp_path):
    from click.testing import CliRunner

    import cli

    made = []
    monkeypatch.setattr(server_module, "open_app", lambda folders, **how: made.append((folders, how["config"])))
    monkeypatch.setattr(server_module, "run", lambda app, sock: sock.close())
    (tmp_path / "token").write_text("a-good-token")
    (tmp_path / "token").chmod(0o600)
    options = ["serve", "--index", "a=b", "--port", "0", "--device", "cpu", "--set", "queue=7", "--clip", "ViT-B-32"]
    said = CliRunner().invoke(cli.cli, options).stderr
    assert "serving a at http://127.0.0.1:" in said and "anybody" not in said
    said = CliRunner().invoke(cli.cli, [*options, "--host", "0.0.0.0"]).stderr
    assert said.startswith("anybody who can reach 0.0.0.0 may use this server: guard it with --token-file")
    said = CliRunner().invoke(cli.cli, [*options, "--host", "0.0.0.0", "--token-file", str(tmp_path / "token")]).stderr
    assert "anybody" not in said and made[-1][1].token == "a-good-token"
    assert made[0][0] == {"a": Path("b")} and made[0][1].queue == 7


def test_without_the_extra_the_server_names_it(world):
    code = """
        import sys
        sys.modules["fastapi"] = None
        from clip_train.settings import UserError
        try:
            import retrieval.server
        except UserError as error:
            print(error)
    """
    shown = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "the server needs fastapi, which is not installed: pip install 'unclip[serve]'"


def test_refused_has_the_shape_of_openais_errors():
    assert Refused(400, "no").body == {
        "error": {"message": "no", "type": "invalid_request_error", "param": None, "code": None}
    }


def test_a_form_in_a_charset_that_reads_nothing_is_refused(client):
    form = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\na\r\n--x--\r\n'
    kind = {"content-type": "multipart/form-data; boundary=x; charset=undefined"}
    answer = client.post("/v1/images/variations", content=form, headers=kind)
    assert answer.status_code == 400 and "not text of the charset that it names" in said(answer)


def test_there_are_as_many_places_for_connections_as_the_system_has_files_for(monkeypatch):
    resource = pytest.importorskip("resource")
    asked = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: asked.append(both))
    for limits, places in (((256, 512), 409), ((1024, -1), 2048), ((99_999, 99_999), 2048), ((-1, -1), 2048)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limits=limits: limits)
        assert server_module.connections() == places
    assert asked == [(512, 512), (2560, -1)]


# A process of its own


class Server:
    """`unclip serve` in a process; the address is what it says on stderr."""

    def __init__(self, *options, port=0):
        command = [sys.executable, "-c", "import cli; cli.main()", "serve", *options, "--port", str(port)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        root = Path(__file__).parent.parent
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=root, env=env)
        self.said = []
        while not any("http://" in line for line in self.said):
            line = self.process.stderr.readline()
            assert line, f"it ended: {self.said}"
            self.said.append(line)
        self.root = next(word for word in self.said[-1].split() if word.startswith("http://")).rstrip("/")

    def ask(self, path, **fields):
        data = json.dumps(fields).encode() if fields else None
        with urllib.request.urlopen(self.root + path, data=data, timeout=30) as answer:
            return json.loads(answer.read())


def test_a_server_that_is_killed_and_started_again_answers_as_before_and_stops_when_told(world, tmp_path):
    shutil.copytree(world / "index", tmp_path / "index")  # without the CLIP, which would take seconds to load
    options = ("--index", f"tiny={tmp_path / 'index'}", "--device", "cpu")
    asked = {"embedding_input": [1.0] * 32, "num_images": 2, "num_result_ids": 4}
    first = Server(*options)
    try:
        before = first.ask("/knn-service", **asked)
        port = int(first.root.rpartition(":")[2])
    finally:
        first.process.kill()
        first.process.communicate(timeout=20)
    again = Server(*options, port=port)
    try:
        assert again.root == first.root and len(before) == 4
        asks = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        asks.request("GET", "/socket", headers={"Connection": "Upgrade", "Upgrade": "websocket"})
        assert asks.getresponse().status == 404  # a WebSocket is answered as anything else
        asks.close()
        assert again.ask("/knn-service", **asked) == before
    finally:
        again.process.send_signal(signal.SIGTERM)
        rest = again.process.communicate(timeout=20)[1]
    assert again.process.returncode == 0 and "Traceback" not in rest
    with pytest.raises(urllib.error.URLError):
        again.ask("/healthz")
