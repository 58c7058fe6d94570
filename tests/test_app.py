"""The page of `diffusers-dpm app`: what it draws, on exact models; the page, by its own client and in a browser."""

import shutil

import numpy as np
import pytest
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

from diffusers_dpm.app import ANY, DRAWS, GRID_OF_ROWS, MASKS, Settings, Studio, build_app
from diffusers_dpm.commands import app as command
from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.pipelines import ClassifierFreeGuidance, DPMPipeline
from diffusers_dpm.schedulers import DDIMScheduler
from tests.commands import assert_named_once, error_of, help_of
from tests.models import ImageMixtureNetwork, save_run, tiny_classifier, tiny_unet
from tests.pipelines.tiny_diffusion_pipelines import save_stable_diffusion


pytestmark = pytest.mark.usefixtures("fresh_process")
REFERENCE = "dpm-solver,timestep_spacing=quadratic"


@pytest.fixture
def exact(run):
    """A model of 1000 timesteps, whose network is exact for N(0.2, 0.25^2) in each pixel."""
    save_run(run, num_train_timesteps=1000, beta_end=0.02, clip_sample=False)
    studio = Studio(str(run), cpu=True)
    network = ImageMixtureNetwork((0.2,), (0.25,), sample_size=8).float()
    studio.pipe.register_modules(unet=network.eval())
    return studio


@pytest.fixture
def labelled(tmp_path):
    """A model with classes a, b, c and a null class."""
    names = {str(i): name for i, name in enumerate("abc")}
    save_run(tmp_path / "labelled", tiny_unet(num_class_embeds=4, _has_null_class=True, _id2label=names))
    return Studio(str(tmp_path / "labelled"), cpu=True)


def painted(background, marked=None):
    """What the editor gives for a grey image (H, W), with a grey stroke over what is marked."""
    opaque = np.full_like(background, 255)
    rgba = np.stack([background, background, background, opaque], axis=-1)
    layer = np.zeros_like(rgba)
    if marked is not None:
        layer[marked] = (128, 128, 128, 255)
    composite = np.where(layer[..., 3:] > 0, layer, rgba)
    return {"background": rgba, "layers": [layer], "composite": composite}


def cells(picture, number, columns, size=8):
    """The images of a grid, uint8 (number, size, size), at the centres of their pixels."""
    pixels = np.asarray(picture.convert("L"))
    width = pixels.shape[1] // columns
    scale = (width - 2) // size
    height = 2 + scale * size + 16  # with a frame, and the label
    places = 1 + scale // 2 + scale * np.arange(size)
    corners = [(i // columns * height, i % columns * width) for i in range(number)]
    return np.stack([pixels[np.ix_(top + places, left + places)] for top, left in corners])


# Race ----------------------------------------------------------------------------------------------------------------


def test_the_error_is_that_from_the_converged_run(exact):
    def errors(calls, steps):
        _, table = exact.race(["ddim", REFERENCE], steps, Settings(calls))
        return [float(error) for _, _, error, _ in table]

    (coarse, near), (fine, nearer) = errors(10, 200), errors(20, 200)
    assert 1.6 < coarse / fine < 2.6  # first order
    assert 0 < near < coarse
    assert 0 < nearer < fine
    assert errors(40, 40)[1] == 0


def test_rows_are_the_images_of_their_seeds(exact):
    picture, _ = exact.race(["ddim"], 20, Settings(5, "3 11"))
    row = picture.crop((220, 3, picture.width - 6, picture.height // 2 - 3))
    exact.pipe.scheduler = DDIMScheduler.from_config(exact.own.config)
    images = exact.pipe(seeds=[3, 11], num_inference_steps=5, output_type="np").images[..., 0]
    np.testing.assert_array_equal(cells(row, 2, 2), (images * 255).round())


def test_no_sampler_makes_more_calls_than_asked_for(exact):
    samplers = ["dpm-solver", "diffusers:HeunDiscreteScheduler", "diffusers:UniPCMultistepScheduler"]
    _, table = exact.race(samplers, 20, Settings(10))
    assert [calls for _, calls, _, _ in table] == [10, 9, 10]


def test_the_converged_run_is_drawn_once(exact):
    counts = []
    for settings in (Settings(3), Settings(5), Settings(5, "7")):
        before = len(exact.pipe.unet.calls)
        exact.race(["ddim"], 20, settings)
        counts.append(len(exact.pipe.unet.calls) - before)
    assert counts == [23, 5, 25]


def test_eta_is_for_ddim(exact):
    def errors(eta):
        _, table = exact.race(["ddim", "dpm-solver"], 100, Settings(20, eta=eta))
        return [float(error) for _, _, error, _ in table]

    (ddim, solver), (noisy, same) = errors(0.0), errors(1.0)
    assert noisy > 3 * ddim
    assert same == solver


def test_a_race_of_stable_diffusion(tmp_path):
    save_stable_diffusion(tmp_path)
    studio = Studio(str(tmp_path), cpu=True)
    assert "calibrated" not in studio.samplers
    calls = {}
    for prompt in ("a", '{"prompt": "a", "guidance_scale": 1.0}'):
        _, table = studio.race(["ddim", REFERENCE], 4, Settings(4, "0 1", prompt=prompt))
        calls[prompt] = [row[1:3] for row in table]
    assert [error == "0" for _, error in calls["a"]] == [False, True]
    assert calls["a"] != calls['{"prompt": "a", "guidance_scale": 1.0}']
    for prompt, message in (("", "prompt"), ('{"size": 3}', "no 'size'"), ("{", r"the prompt {: ")):
        with pytest.raises(DiffusersDPMError, match=message):
            studio.race(["ddim"], 4, Settings(4, prompt=prompt))


def test_runs_of_every_process_have_the_whole_page(tmp_path):
    for scheduler in (EDMEulerScheduler(), FlowMatchEulerDiscreteScheduler()):
        folder = tmp_path / type(scheduler).__name__
        DPMPipeline(tiny_unet(), scheduler).save_pretrained(folder)
        studio = Studio(str(folder), cpu=True)
        _, table = studio.race(["edm", "dpm-solver"], 20, Settings(5))
        assert studio.is_pixel
        assert len(table) == 2


# Classes and guidance ------------------------------------------------------------------------------------------------


def test_class_and_guidance_are_those_of_the_pipeline(labelled):
    assert labelled.labels == ["a", "b", "c"]
    found = labelled.example("ddim", Settings(5, "4", "b", scale=3.0))
    labelled.pipe.scheduler = DDIMScheduler.from_config(labelled.own.config)
    arguments = {"seeds": [4], "num_inference_steps": 5, "output_type": "np"}
    guided = labelled.pipe(class_labels=[1], guidance=ClassifierFreeGuidance(3.0), **arguments).images
    np.testing.assert_array_equal(found[16::32, 16::32, 0], (guided[0, ..., 0] * 255).round())
    assert not np.array_equal(found, labelled.example("ddim", Settings(5, "4", "b")))
    assert not np.array_equal(found, labelled.example("ddim", Settings(5, "4", "c", scale=3.0)))


def test_a_classifier_guides_where_a_class_is_chosen(run):
    plain = Studio(str(run), cpu=True)
    assert (plain.labels, plain.is_guided) == ([], False)
    tiny_classifier(num_classes=3).save_pretrained(run / "classifier")
    studio = Studio(str(run), cpu=True)
    assert (studio.labels, studio.is_guided) == (["0", "1", "2"], True)
    unguided = plain.example("ddim", Settings(5))
    np.testing.assert_array_equal(studio.example("ddim", Settings(5, scale=9.0)), unguided)
    np.testing.assert_array_equal(studio.example("ddim", Settings(5, label="1", scale=0.0)), unguided)
    assert not np.array_equal(studio.example("ddim", Settings(5, label="1", scale=9.0)), unguided)
    (run / "classifier" / "config.json").write_text("{")
    with pytest.raises(DiffusersDPMError, match=r"classifier/config.json"):
        Studio(str(run), cpu=True)


# Edit ----------------------------------------------------------------------------------------------------------------


def test_what_is_not_marked_is_kept(exact):
    background = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    marked = np.zeros((8, 8), bool)
    marked[:, 5:] = True
    result = exact.edit(painted(background, marked), MASKS, 1.0, "ddim", Settings(5, "0-9"))
    images = cells(result, 10, 8)
    assert (images[..., :5] == background[:, :5]).all()
    assert (images[..., 5:].std(axis=0) > 0).all()
    drawn = exact.edit(painted(background, marked), DRAWS, 0.1, "ddim", Settings(20, "0-1"))
    assert (cells(drawn, 2, 2)[..., :5] != background[:, :5]).any()


def test_strength_is_how_far_from_the_picture(exact):
    black = np.zeros((8, 8), np.uint8)
    means = [
        cells(exact.edit(painted(black), DRAWS, strength, "ddim", Settings(20)), 4, 4).mean()
        for strength in (0.1, 0.5, 1.0)
    ]
    assert means[0] < means[1] < means[2]
    assert means[2] == pytest.approx(255 * 0.6, abs=8)  # the data's mean


def test_the_picture_is_cropped_and_put_on_black(exact):
    wide = np.zeros((16, 48, 4), np.uint8)
    wide[:, :, 0] = 255
    wide[:, 24:, 3] = 255  # a half is transparent
    given = {"background": None, "layers": [], "composite": wide}
    picture, _ = exact.round_trip(given, DRAWS, Settings(5))
    (shown,) = cells(picture, 1, 3).astype(float)
    assert (shown[:, :3] < 10).all()
    assert shown[:, 5:] == pytest.approx(76, abs=10)  # red as grey


def test_more_calls_draw_a_picture_again_more_nearly(exact):
    background = np.random.default_rng(0).normal(153, 32, (8, 8)).round().astype(np.uint8)
    errors = []
    for calls in (3, 6, 12):
        picture, note = exact.round_trip(painted(background), DRAWS, Settings(calls))
        errors.append(float(note.split("**")[1]))
        shown, _, again = cells(picture, 3, 3).astype(float)
        np.testing.assert_array_equal(shown, background)
        assert np.sqrt(np.mean((again - shown) ** 2)) / 255 == pytest.approx(errors[-1], rel=0.05, abs=0.001)
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_encoding_is_for_the_chosen_class_or_none(labelled):
    given = painted(np.full((8, 8), 100, np.uint8))
    seen = []
    labelled.pipe.unet.register_forward_pre_hook(
        lambda _, arguments, keywords: seen.append(keywords["class_labels"].tolist()), with_kwargs=True
    )
    labelled.round_trip(given, DRAWS, Settings(3))
    labelled.round_trip(given, DRAWS, Settings(3, label="b"))
    assert seen == [[3]] * 5 + [[1]] * 5  # two steps there, three back


def test_what_cannot_be_is_said_in_a_line(exact):
    picture, settings = painted(np.zeros((8, 8), np.uint8)), Settings(3)
    for message, work in (
        ("1 to 16 seeds, such as 0-3, not 0", lambda: exact.animate("ddim", Settings(seeds=""))),
        ("1 to 16 seeds, such as 0-3, not 17", lambda: exact.animate("ddim", Settings(seeds="0-16"))),
        ("1 to 6 samplers, not 0", lambda: exact.race([], 20, settings)),
        ("unknown scheduler 'dim'", lambda: exact.race(["dim"], 20, settings)),
        ("no picture", lambda: exact.edit({"background": None, "composite": None}, DRAWS, 1, "ddim", settings)),
        ("nothing is marked", lambda: exact.edit(picture, MASKS, 1, "ddim", settings)),
    ):
        with pytest.raises(DiffusersDPMError, match=message):
            work()


# The page ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def serve():
    pages = []

    def serve(model):
        pages.append(build_app(str(model), cpu=True))
        return pages[-1].launch(prevent_thread_lock=True, quiet=True)[1]

    yield serve
    for page in pages:
        page.close(verbose=False)


def test_the_page_by_its_own_client(run, serve, tmp_path):
    client = Client(serve(run), verbose=False, download_files=tmp_path)
    settings = [5, "0-1", ANY, 1.0, 0.0, ""]
    picture, table = client.predict([REFERENCE, "ddim"], 20, *settings, api_name="/race")
    assert [row[:2] for row in table["data"]] == [[REFERENCE, 5], ["ddim", 5]]
    with Image.open(picture) as image:
        assert image.width == 220 + 6 + 2 * (GRID_OF_ROWS["min_width"] + 2)
    with Image.open(client.predict("ddim", *settings, api_name="/animate")) as animation:
        assert animation.n_frames == 5  # the last prediction is the image
    with pytest.raises(AppError, match="unknown scheduler 'dim'"):
        client.predict("dim", *settings, api_name="/animate")


def test_help_and_a_model_that_is_none(capsys, tmp_path):
    assert_named_once(command.AppOptions, help_of("app", capsys))
    assert f"cannot load {tmp_path}" in error_of("app", capsys, str(tmp_path))


CHROMIUM = shutil.which("chromium")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_every_tab_in_a_browser(tmp_path, serve):
    from playwright.sync_api import sync_playwright

    save_run(tmp_path, tiny_unet(num_class_embeds=4, _has_null_class=True))
    url, errors = serve(tmp_path), []
    with sync_playwright() as play:
        # as root, as in containers, Chromium runs without its sandbox only
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 1000})
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: errors.append(request.url) if is_elsewhere(request.url, url) else None)
        page.goto(url)
        image = page.locator("img[src*='/file=']:visible").first

        def click(name):
            page.get_by_role("button", name=name, exact=True).click()

        page.get_by_label("2", exact=True).check()  # a class
        page.get_by_label("steps of the converged run").first.fill("20")
        click("Race")
        image.wait_for()
        assert page.locator("td").filter(has_text="dpm-solver").count() > 0
        assert image.evaluate("image => image.naturalWidth") > 600
        page.get_by_role("tab", name="Trajectory").click()
        click("Draw")
        image.wait_for()
        assert ".gif" in image.get_attribute("src")
        page.get_by_role("tab", name="Edit").click()
        page.get_by_label("marks what is drawn anew").check()
        click("Edit")
        page.get_by_text("nothing is marked").wait_for()
        with page.expect_response(lambda response: "/file=" in response.url):
            click("Take the image of the first seed")
        page.wait_for_timeout(1000)  # the editor shows it, and forgets what was painted before
        box = page.locator("canvas:visible").first.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x + 40, y + 40, steps=5)
        page.mouse.up()
        click("Edit")
        image.wait_for()
        click("Encode, and draw again")
        page.get_by_text("RMS error of pixels").wait_for()
        browser.close()
    assert errors == []


def is_elsewhere(address, url):
    """Whether this is a request to another host than the page's."""
    return not address.startswith((url, url.replace("http", "ws"), "data:", "blob:"))
