"""With decode=False a stream is the first stage of a pipeline of webdataset's."""

import numpy as np
import webdataset
from conftest import sample_members, write_shards, write_tar
from streams import SIZES, train_order

from wds_convnext.shards.opening import open_dataset
from wds_convnext.stream.order import EvalOrder
from wds_convnext.stream.stream import ShardStream


def samples_by_key(samples) -> dict[str, dict]:
    """webdataset's dicts, without what says how it opened the file."""
    return {
        sample["__key__"]: {k: v for k, v in sample.items() if k != "__local_path__"}
        for sample in samples
    }


def test_without_decoding_it_is_a_first_stage_of_a_webdataset_pipeline(tmp_path):
    """The same dicts as plain webdataset reads from the same shards, in this project's order."""
    for i, size in enumerate([4, 3]):
        members = sample_members(size, start=10 * i)
        captions = [(name.replace(".cls", ".txt"), b"a caption") for name, _ in members[1::2]]
        triples = zip(members[::2], members[1::2], captions)
        write_tar(tmp_path / f"train-{i:03d}.tar", [m for triple in triples for m in triple])
    dataset = open_dataset(str(tmp_path))
    order = train_order(dataset, global_batch=7, buffer=7)
    stream = ShardStream(dataset, order, batch_size=7, decode=False)
    pipeline = webdataset.DataPipeline(
        stream, webdataset.map(lambda sample: sample), webdataset.slice(7)
    )

    ours = list(pipeline)

    theirs = list(webdataset.WebDataset([s.path for s in dataset.shards], shardshuffle=False))
    assert samples_by_key(ours) == samples_by_key(theirs)
    assert len(ours) == 7
    numbers = order.global_batch(0).number
    assert [s["__key__"] for s in ours] == [theirs[number]["__key__"] for number in numbers]
    assert [s["__key__"] for s in ours] != [s["__key__"] for s in theirs]


def test_a_webdataset_pipeline_decodes_on_top_of_the_stream(tmp_path):
    """Its own stages after ours: decode to arrays, to tuples, to batches."""
    dataset = open_dataset(str(write_shards(tmp_path, SIZES)))
    stream = ShardStream(dataset, EvalOrder(dataset.sizes), batch_size=4, decode=False)
    pipeline = webdataset.DataPipeline(
        stream,
        webdataset.decode("rgb8"),
        webdataset.to_tuple("jpg", "cls"),
        webdataset.batched(5),
    )

    batches = list(pipeline)

    assert [len(labels) for _, labels in batches] == [5, 5, 5, 5, 3]
    assert np.concatenate([labels for _, labels in batches]).tolist() == [i % 4 for i in range(23)]
    assert batches[0][0].shape == (5, 20, 24, 3)
