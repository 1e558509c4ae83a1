"""A run's folder."""

from training.run import save


def test_the_next_checkpoint_removes_what_a_killed_writer_left(tmp_path):
    """Also of another step: at full size it is 199 GB. Nothing else beside it is touched."""
    left = tmp_path / "checkpoints" / ".00000002.qwen-image-flash.part"
    left.mkdir(parents=True)
    (left / "student-0000-of-0001.safetensors").touch()
    (left.parent / ".DS_Store").touch()
    for step in (3, 4, 5):
        save(tmp_path, step, {})
    assert sorted(path.name for path in left.parent.iterdir()) == [".DS_Store", "00000004", "00000005"]
