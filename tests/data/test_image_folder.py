import numpy as np
import pytest
from PIL import Image

from raysched.config.run import DataConfig
from raysched.data.dataset import load_dataset
from raysched.data.image_folder import decode_folder, decode_image, list_folder
from raysched.errors import DataError


def paint(path, color=(255, 0, 0), size=(6, 6), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)
    return path


def folder_config(root, tmp_path, **options):
    return DataConfig(
        source="image_folder", path=str(root), cache_dir=str(tmp_path / "cache"), **options
    )


def test_subfolders_are_classes_in_sorted_order_however_deep(tmp_path):
    root = tmp_path / "images"
    paint(root / "dog" / "a.png")
    paint(root / "cat" / "deep" / "deeper" / "b.JPG")
    paint(root / "cat" / "a.webp")
    listing = list_folder(root)
    assert listing.class_names == ("cat", "dog")
    assert [str(path.relative_to(root)) for path in listing.files] == [
        "cat/a.webp",
        "cat/deep/deeper/b.JPG",
        "dog/a.png",
    ]
    assert listing.labels == [0, 0, 1]


def test_images_directly_in_the_folder_are_one_class(tmp_path):
    for name in ("c", "a", "b"):
        paint(tmp_path / "pets" / f"{name}.png")
    listing = list_folder(tmp_path / "pets")
    assert [path.name for path in listing.files] == ["a.png", "b.png", "c.png"]
    assert listing.labels == [0, 0, 0]
    assert listing.class_names == ("pets",)


def test_a_linked_class_folder_is_followed_and_a_circle_is_not(tmp_path):
    paint(tmp_path / "elsewhere" / "x.png")
    paint(tmp_path / "root" / "a" / "y.png")
    (tmp_path / "root" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "a" / "loop").symlink_to(tmp_path / "root")
    assert list_folder(tmp_path / "root").class_names == ("a", "b")
    assert len(list_folder(tmp_path / "root").files) == 2


def test_a_link_to_a_file_that_is_gone_is_named(tmp_path):
    root = tmp_path / "images"
    paint(root / "a.png")
    (root / "b.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(DataError, match=r"b\.png: can't be read .*repair or remove it"):
        load_dataset(folder_config(root, tmp_path))


def test_hidden_files_and_litter_are_no_mistake(tmp_path):
    paint(tmp_path / "a.png")
    (tmp_path / ".DS_Store").write_text("x")
    (tmp_path / "Thumbs.db").write_text("x")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("x")
    assert len(list_folder(tmp_path).files) == 1


def test_images_beside_class_folders_are_refused(tmp_path):
    paint(tmp_path / "stray.png")
    paint(tmp_path / "cat" / "a.png")
    with pytest.raises(DataError, match=r"stray\.png.*move them into a subfolder"):
        list_folder(tmp_path)


def test_a_file_that_is_no_image_is_named(tmp_path):
    paint(tmp_path / "a" / "x.png")
    (tmp_path / "a" / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"1 file.*a/notes\.txt; move them elsewhere"):
        list_folder(tmp_path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "doesn't exist"),
        (lambda path: path.write_text("x"), "isn't a folder"),
        (lambda path: path.mkdir(), "holds no images"),
        (lambda path: (path / "a" / "b").mkdir(parents=True), "holds no images"),
    ],
)
def test_a_folder_without_images_is_a_clear_message(tmp_path, make, words):
    root = tmp_path / "images"
    make(root)
    with pytest.raises(DataError, match=rf"data\.path: .*images.*{words}"):
        list_folder(root)


def test_image_folder_without_a_path_says_which_key_to_set(tmp_path):
    with pytest.raises(DataError, match=r"data\.path=FOLDER"):
        load_dataset(DataConfig(source="image_folder", cache_dir=str(tmp_path)))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".webp", ".tif", ".bmp"])
def test_a_file_cut_short_is_named_with_what_to_do(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    bad, good = tmp_path / f"bad{suffix}", tmp_path / f"good{suffix}"
    Image.fromarray(noise).save(good)
    bad.write_bytes(good.read_bytes()[: good.stat().st_size // 3])
    with pytest.raises(DataError, match=r"1 image.*bad\.\w+ \(.*replace or remove") as caught:
        decode_folder(list_folder(tmp_path), 8, False)
    assert "good" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not an image at all", b"\x89PNG\r\n\x1a\n"])
def test_a_file_with_other_content_is_named(tmp_path, content):
    (tmp_path / "fake.png").write_bytes(content)
    paint(tmp_path / "real.png")
    with pytest.raises(DataError, match=r"fake\.png"):
        decode_folder(list_folder(tmp_path), 8, False)


def test_many_broken_files_are_counted_and_only_some_are_listed(tmp_path):
    for number in range(9):
        (tmp_path / f"{number}.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"9 image.*4\.png and 4 more"):
        decode_folder(list_folder(tmp_path), 8, False)


def test_transparency_is_composited_on_white(tmp_path):
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    image.save(tmp_path / "a.png")
    pixels = decode_image(tmp_path / "a.png", 4, False)
    assert pixels[:, 0, 0].tolist() == [255, 0, 0]
    assert (pixels[:, 1:, 1:] == 255).all()


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    Image.fromarray(np.full((4, 4), 32768, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert (decode_image(tmp_path / "deep.png", 4, True) == 127).all()


def test_a_wide_image_is_cropped_in_the_middle(tmp_path):
    pixels = np.zeros((8, 24, 3), dtype=np.uint8)
    pixels[:, 8:16] = 200
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert (decode_image(tmp_path / "wide.png", 8, False) == 200).all()


def test_a_turned_photo_stands_upright(tmp_path):
    image = Image.fromarray(np.array([[10, 200]], dtype=np.uint8).repeat(8, 0).repeat(4, 1))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    upright = decode_image(tmp_path / "turned.png", 8, True)[0]
    assert (upright[:4] == 10).all()
    assert (upright[4:] == 200).all()


def test_grayscale_folders_have_one_channel_and_colour_ones_three(tmp_path):
    root = tmp_path / "images"
    for number in range(4):
        paint(root / "one" / f"{number}.png", (0, 60 * number, 0))
    colour = load_dataset(folder_config(root, tmp_path))
    grey = load_dataset(folder_config(root, tmp_path, grayscale=True, image_size=12))
    assert colour.images.shape == (4, 3, 32, 32)
    assert (colour.images[2, :, 5, 5] == [0, 120, 0]).all()
    assert grey.images.shape == (4, 1, 12, 12)


def test_a_changed_file_is_decoded_anew(tmp_path):
    root = tmp_path / "images"
    for number in range(4):
        paint(root / f"{number}.png", (0, 0, 0))
    before = load_dataset(folder_config(root, tmp_path))
    paint(root / "2.png", (255, 255, 255), size=(9, 9))
    after = load_dataset(folder_config(root, tmp_path))
    assert (before.images[2] == 0).all()
    assert (after.images[2] == 255).all()
