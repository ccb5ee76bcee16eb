import faiss
import numpy as np
import pytest
import tiny

from retrieval.vectors import reconstruct, sources_of, store_of

DIM = 32


@pytest.mark.parametrize(
    "kind, least",
    [
        ("Flat", 0.9999),
        ("SQfp16", 0.9999),
        ("HNSW16", 0.9999),
        ("IVF20,SQ8", 0.999),
        ("IVF20,PQ16x4fs,Refine(SQ8)", 0.999),
        ("PCA32,IVF20,PQ16x4fs,Refine(SQ8)", 0.999),
        ("PCA32,IVF20,SQ8", 0.999),
    ],
)
def test_every_kind_remembers_its_rows_read_from_its_file(kind, least, tmp_path):
    rows = tiny.unit_rows(1000, DIM)
    index = faiss.index_factory(DIM, kind, faiss.METRIC_INNER_PRODUCT)
    index.train(rows)
    index.add(rows)
    faiss.write_index(index, str(tmp_path / "x.index"))
    index = faiss.read_index(str(tmp_path / "x.index"), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    some = np.array([999, 3, 3, 500])
    again = reconstruct(index, some)
    np.testing.assert_allclose(np.linalg.norm(again, axis=1), 1, atol=1e-5)
    assert np.einsum("nd,nd->n", again, rows[some]).min() > least
    assert index.search(rows[:5], 1)[1][:, 0].tolist() == [0, 1, 2, 3, 4]  # as before


def test_embeddings_are_found_where_they_were_or_where_one_looks_but_only_the_same(tmp_path):
    from retrieval.index import build_index

    tiny.store(tmp_path / "emb", tiny.unit_rows(20, DIM))
    tiny.store(tmp_path / "other", tiny.unit_rows(20, DIM, 1))
    (source,) = sources_of(build_index(tmp_path / "emb", tmp_path / "index"))
    assert store_of(source).folder == tmp_path / "emb"
    (tmp_path / "emb").rename(tmp_path / "moved")
    assert store_of(source) is None
    assert store_of(source, [tmp_path / "other", tmp_path / "nothing"]) is None
    assert store_of(source, [tmp_path / "other", tmp_path / "moved"]).folder == tmp_path / "moved"
    (tmp_path / "other").rename(tmp_path / "emb")  # another folder in the old place
    assert store_of(source) is None
