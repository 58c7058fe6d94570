"""Arguments of guided sampling: scales, labels, intervals, precision, modes, what is called and what is refused."""

import diffusers
import pytest
import torch
from diffusers import ModelMixin

from diffusers_dpm.pipelines import ClassifierGuidance, pipeline_dpm
from diffusers_dpm.schedulers import DDIMScheduler, DDPMScheduler, DPMSolverScheduler
from tests.models import HeadClassifier, ImageMixtureClassifier, ImageMixtureNetwork, fitted_scheduler

from .test_guidance import LINEAR, guided_pair, latents, path


@pytest.fixture
def pipe(make_pipe):
    return guided_pair(make_pipe, DDIMScheduler(**LINEAR))[0]


@pytest.fixture
def real_pipe(make_pipe):
    """A real U-Net with three classes in the classifier only."""
    pipe = make_pipe(DDIMScheduler())
    pipe.register_modules(classifier=HeadClassifier())
    return pipe


# Scales, labels, intervals ---------------------------------------------------------------------------------------


SOME = [
    DDPMScheduler(),
    DDPMScheduler(variance_type="learned_range"),
    DDIMScheduler(eta=0.5),
    DPMSolverScheduler(solver_order=3),
    diffusers.DDPMScheduler(),
    diffusers.UniPCMultistepScheduler(),
    diffusers.HeunDiscreteScheduler(),
]


@pytest.mark.parametrize("scheduler", SOME, ids=lambda s: f"{type(s).__module__.split('.')[0]}.{type(s).__name__}")
def test_scale_zero_is_no_guidance_bit_for_bit(make_pipe, scheduler):
    pipe = make_pipe(scheduler, out_channels=6)
    unguided = path(pipe, seeds=[3, 4])
    pipe.register_modules(classifier=HeadClassifier(broken_below=1000))
    arguments = {"seeds": [3, 4], "class_labels": [0, 2]}
    assert torch.equal(path(pipe, **arguments, guidance_scale=0), unguided)
    assert torch.equal(path(pipe, **arguments, guidance_scale=[0.0, 0.0], clip_order="before"), unguided)
    assert torch.equal(path(pipe, seeds=[3, 4], class_labels=-1), unguided)
    assert torch.equal(path(pipe, seeds=[3, 4]), unguided)  # no label, no guidance
    assert torch.equal(path(pipe, seeds=[3, 4], cond_fn=lambda *a: 1 / 0, guidance_scale=0), unguided)


@pytest.mark.parametrize("library", [diffusers, None], ids=["diffusers", "ours"])
def test_epsilon_belongs_to_the_clipped_x0(make_pipe, library):
    """A strong shift under a DDIM that clips x_0: as if it derived epsilon from the clipped x_0 by itself."""
    scheduler = (library.DDIMScheduler if library else DDIMScheduler)()

    def push(x_t, t, x0_hat):
        return 40 * x_t.flatten(1).sum(dim=1)

    pipe = make_pipe(scheduler, out_channels=3)
    drawn = path(pipe, seeds=[3, 4], cond_fn=push)
    assert drawn.abs().max() < 10  # it stays with the data, times a standard normal
    pipe.scheduler = DDIMScheduler(use_clipped_model_output=True)
    torch.testing.assert_close(drawn, path(pipe, seeds=[3, 4], cond_fn=push), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scheduler", [SOME[0], SOME[2], SOME[3]], ids=lambda s: type(s).__name__)
def test_an_image_depends_on_its_seed_label_and_scale_alone(make_pipe, scheduler):
    pipe = make_pipe(scheduler, ImageMixtureNetwork())
    pipe.register_modules(classifier=ImageMixtureClassifier())
    arguments = {"max_gradient_norm": 2.0}
    seeds, labels, scales = [7, 8, 9, 10], [0, 1, -1, 1], [1.0, 2.5, 3.0, 0.0]
    batch = path(pipe, seeds=seeds, class_labels=labels, guidance_scale=scales, **arguments)
    for i in range(4):
        alone = path(
            pipe, seeds=seeds[i : i + 1], class_labels=labels[i], guidance_scale=torch.tensor(scales[i]), **arguments
        )
        # Not bit for bit: a processor may take one image and four through other instructions.
        torch.testing.assert_close(batch[:, i : i + 1], alone, rtol=1e-5, atol=1e-6)
    unguided = path(pipe, seeds=seeds)
    torch.testing.assert_close(batch[:, 2:], unguided[:, 2:], rtol=1e-5, atol=1e-6)
    assert ((batch - unguided)[-1, :2].abs().flatten(1).amax(1) > 0.01).all()


def test_labels_reach_the_network_and_the_classifier(make_pipe):
    """A network of classes guided further by the classifier: w = 1 counts the evidence twice."""
    pipe, conditional = guided_pair(make_pipe, DDIMScheduler(**LINEAR))
    conditional.register_modules(classifier=pipe.classifier)
    arguments = {"class_labels": [0, 1], "seeds": [0, 1]}
    plain = path(conditional, **arguments, guidance_scale=0)
    assert not pipe.classifier.calls
    output = conditional(**arguments, num_inference_steps=12, output_type="pt", return_trajectory=True)
    assert len(pipe.classifier.calls) == 12
    assert output.class_labels.tolist() == [0, 1]
    assert (output.trajectory.latents[-1] - plain[-1]).abs().max() > 1e-3
    drawn = conditional(seeds=[0, 1], num_inference_steps=12, output_type="pt")
    again = conditional(seeds=[0, 1], class_labels=drawn.class_labels, num_inference_steps=12, output_type="pt")
    assert torch.equal(drawn.images, again.images)


def test_guided_labels_are_reported(pipe):
    output = pipe(class_labels=[0, -1, 1], num_inference_steps=2, output_type="pt")
    assert output.class_labels.tolist() == [0, -1, 1]
    assert pipe(num_inference_steps=2, output_type="pt").class_labels is None


def test_interval(pipe):
    """Both ends count; before it, the walk is that without guidance."""
    arguments = {"seeds": [0], "num_inference_steps": 10}  # timesteps 900, 800, ... 0
    unguided = path(pipe, **arguments)
    guided = path(pipe, **arguments, class_labels=0, guidance_interval=(200, 600))
    assert pipe.classifier.calls == [600, 500, 400, 300, 200]
    assert torch.equal(guided[:4], unguided[:4])
    assert not torch.equal(guided[4], unguided[4])
    everywhere = path(pipe, **arguments, class_labels=0, guidance_interval=(0, 999))
    assert torch.equal(everywhere, path(pipe, **arguments, class_labels=0))


def test_gradient_norm_is_bounded_for_each_image(make_pipe):
    """The first step's x_0 moves by w sigma^2 / alpha times a gradient of norm at most 1.5."""
    pipe = make_pipe(DDIMScheduler(**LINEAR, clip_sample=False), ImageMixtureNetwork())
    slopes = torch.tensor([0.25, 2.0, 40.0], dtype=torch.float64)  # norms over 4 pixels: 0.5, 4, 80

    def cond_fn(x_t, t, x0_hat):
        return slopes * x_t.flatten(1).sum(1)

    arguments = {"latents": latents(3), "num_inference_steps": 2, "output_type": "pt", "return_trajectory": True}
    x0 = [
        pipe(**arguments, **options).trajectory.pred_original_sample[0]
        for options in ({}, {"cond_fn": cond_fn, "max_gradient_norm": 1.5, "guidance_scale": 3.0})
    ]
    level = pipe.scheduler.levels[0]
    norms = (x0[1] - x0[0]).flatten(1).norm(dim=1) * level.alpha / (3 * level.sigma**2)
    torch.testing.assert_close(norms, torch.tensor([0.5, 1.5, 1.5], dtype=torch.float64), atol=1e-9, rtol=0)


def test_learned_variance_is_not_shifted(make_pipe):
    """DDPM with a network of 2C channels: guidance moves the mean, and not the noise that the network asks for."""
    pipe = make_pipe(DDPMScheduler(variance_type="learned_range", clip_sample=False), out_channels=6)
    seen = []
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda output, *arguments, **options: (
        seen.append(output) or step(output, *arguments, **options)
    )
    arguments = {"seeds": [0, 1], "num_inference_steps": 1}
    path(pipe, **arguments)
    path(pipe, **arguments, cond_fn=lambda x_t, t, x0: x_t.flatten(1).sum(1))
    level = pipe.scheduler.levels[0]
    assert torch.equal(seen[0][:, 3:], seen[1][:, 3:])
    torch.testing.assert_close(seen[1][:, :3], seen[0][:, :3] - level.sigma, atol=1e-5, rtol=0)


def test_zero_terminal_snr(make_pipe):
    """Where alpha = 0 nothing is shifted: x_t is noise, and the classifier is not asked."""
    for scheduler in (DDIMScheduler, diffusers.DDIMScheduler):
        guided, _ = guided_pair(
            make_pipe,
            scheduler(
                **LINEAR, rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"
            ),
            "v_prediction",
        )
        guided.unet = ImageMixtureNetwork(prediction_type="v_prediction", rescale_betas_zero_snr=True)
        unguided = path(guided, seeds=[0], num_inference_steps=5)
        found = path(guided, seeds=[0], num_inference_steps=5, class_labels=1)
        assert guided.classifier.calls == [799, 599, 399, 199]
        assert torch.equal(found[1], unguided[1])
        assert found.isfinite().all()
        assert not torch.equal(found[2], unguided[2])


# What is called, and how -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "calls"),
    [(DPMSolverScheduler(solver_order=3, method="singlestep"), 7), (diffusers.HeunDiscreteScheduler(), 13)],
    ids=["singlestep", "Heun"],
)
def test_every_network_call_is_guided_once(make_pipe, scheduler, calls):
    pipe, _ = guided_pair(make_pipe, scheduler)
    path(pipe, class_labels=[0, 1], num_inference_steps=7)
    assert len(pipe.classifier.calls) == len(pipe.unet.calls) == calls
    assert pipe.classifier.calls == pipe.scheduler.timesteps.tolist()


def test_no_graph_goes_through_the_network_unless_asked(pipe):
    def cond_fn(x_t, t, x0_hat):
        return -((x0_hat - 0.3) ** 2).flatten(1).sum(1)

    path(pipe, class_labels=[0, 1], num_inference_steps=3)
    path(pipe, cond_fn=cond_fn, num_inference_steps=3)
    modes = [call["modes"] for call in pipe.unet.calls]
    assert modes == [(False, False, False)] * 6  # (input requires a gradient, grad mode, training)
    found = path(pipe, cond_fn=cond_fn, guidance_through_unet=True, num_inference_steps=3)
    assert [call["modes"] for call in pipe.unet.calls[6:]] == [(True, True, False)] * 3
    assert not found.requires_grad


def test_parameters_get_no_gradient_and_modes_are_kept(real_pipe):
    """The classifier's dropout is off, whatever mode it was in."""
    real_pipe.classifier.train()
    arguments = {"seeds": [0, 1], "class_labels": [0, 1], "guidance_scale": 50.0}
    first = path(real_pipe, **arguments)
    assert torch.equal(path(real_pipe, **arguments), first)
    assert real_pipe.classifier.dropout.training
    path(real_pipe, seeds=[0], cond_fn=lambda x_t, t, x0: x0.flatten(1).sum(1), guidance_through_unet=True)
    networks = [real_pipe.unet, real_pipe.classifier]
    assert all(weight.grad is None for network in networks for weight in network.parameters())
    assert all(weight.requires_grad for network in networks for weight in network.parameters())


@pytest.mark.parametrize("context", [torch.inference_mode, torch.enable_grad])
def test_gradients_are_taken_whatever_the_callers_mode(real_pipe, context):
    arguments = {"seeds": [0, 1], "class_labels": [0, 1], "guidance_scale": 50.0}
    options = {"cond_fn": lambda x_t, t, x0: x0.flatten(1).sum(1), "guidance_through_unet": True}
    expected = path(real_pipe, **arguments), path(real_pipe, seeds=[0], **options)
    with context():
        found = path(real_pipe, **arguments), path(real_pipe, seeds=[0], **options)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_networks_from_inference_mode(real_pipe):
    """They sample, and guide with a message of what is wrong."""
    with torch.inference_mode():
        real_pipe.classifier = HeadClassifier()
        real_pipe.unet = type(real_pipe.unet).from_config(real_pipe.unet.config)
    assert path(real_pipe, class_labels=[0, 1], guidance_scale=0).isfinite().all()
    with pytest.raises(ValueError, match="inference_mode"):
        path(real_pipe, class_labels=[0, 1])


def test_half_precision_classifier(make_pipe):
    """A classifier that is sure: gradients of 1e-8 in each pixel, which float16 cannot hold, count as they should."""
    pipe = make_pipe(DDIMScheduler(clip_sample=False))
    pipe.register_modules(classifier=HeadClassifier())
    with torch.no_grad():
        pipe.classifier.head.bias[0] = 18.0
    arguments = {"seeds": [0, 1], "num_inference_steps": 2}
    unguided, moved = path(pipe, **arguments), []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        pipe.classifier.to(dtype)
        guided = path(pipe, **arguments, class_labels=0, guidance_scale=5e7)
        assert guided.dtype == torch.float32
        moved.append(guided[1] - unguided[1])
    assert moved[0].abs().max() > 0.01
    for other in moved[1:]:  # a logit of 18 has an error of 0.06 in bfloat16
        torch.testing.assert_close(other, moved[0], atol=0.1 * moved[0].abs().max().item(), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_network_of_other_precision_can_be_guided(real_pipe, make_unet, dtype):
    arguments = {"latents": torch.randn(2, 3, 8, 8), "class_labels": [0, 1], "guidance_scale": 20.0}
    expected = path(real_pipe, **arguments)
    real_pipe.unet = make_unet().to(dtype)
    found = path(real_pipe, **arguments)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (found - expected).abs().mean() < 0.01


def test_classifier_may_return_a_tensor_and_have_no_config(make_pipe):
    pipe, _ = guided_pair(make_pipe, DDIMScheduler(**LINEAR))
    expected = path(pipe, class_labels=[0, 1], seeds=[0, 1])

    class Plain(ModelMixin):
        def __init__(self):
            super().__init__()
            self.mixture = ImageMixtureNetwork()
            self.weight = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, sample, timestep):
            return self.mixture.logits(sample, timestep)

    pipe.classifier = Plain()
    assert torch.equal(path(pipe, class_labels=[0, 1], seeds=[0, 1]), expected)
    with pytest.raises(ValueError, match=r"logits \(2, 2\).* 2"):
        path(pipe, class_labels=[0, 2])


def test_cond_fn_instead_of_the_classifier(pipe):
    """It sees what the classifier sees, and the network's unclipped x_0."""
    labels = torch.tensor([0, 1])
    seen = []

    def cond_fn(x_t, t, x0_hat):
        seen.append((t.shape, t.item(), x0_hat.abs().max().item()))
        return pipe.classifier(x_t, t).log_softmax(1)[torch.arange(2), labels]

    expected = path(pipe, class_labels=labels, seeds=[0, 1])
    torch.testing.assert_close(path(pipe, cond_fn=cond_fn, seeds=[0, 1]), expected, atol=1e-12, rtol=0)
    assert [shape for shape, _, _ in seen] == [()] * 12
    assert [t for _, t, _ in seen] == pipe.scheduler.timesteps.tolist()


# The object and its short form --------------------------------------------------------------------------------------


def energy(x_t, t, x0_hat):
    return torch.cos(x_t).flatten(1).sum(1) + x0_hat.flatten(1).sum(1)


@pytest.mark.parametrize(
    ("shortcuts", "fields"),
    [
        ({}, {}),
        ({"guidance_scale": [3.0, 0.1]}, {"scale": [3.0, 0.1]}),
        (
            {"guidance_interval": (200, 700), "max_gradient_norm": 0.5},
            {"interval": (200, 700), "max_gradient_norm": 0.5},
        ),
        ({"clip_order": "before", "guidance_scale": 9.0}, {"clip_order": "before", "scale": 9.0}),
        ({"guidance_mode": "mean_shift", "guidance_scale": 9.0}, {"mode": "mean_shift", "scale": 9.0}),
        ({"cond_fn": energy, "guidance_through_unet": True}, {"log_prob": energy, "through_unet": True}),
    ],
    ids=["default", "scale", "bounds", "clip_order", "mode", "cond_fn"],
)
def test_guidance_object_is_its_shortcuts_bit_for_bit(real_pipe, shortcuts, fields):
    real_pipe.scheduler = DDPMScheduler()
    arguments = {"seeds": [3, 4], **({} if "cond_fn" in shortcuts else {"class_labels": [0, 2]})}
    guided = path(real_pipe, **arguments, guidance=ClassifierGuidance(**fields))
    assert torch.equal(guided, path(real_pipe, **arguments, **shortcuts))
    assert not torch.equal(guided, path(real_pipe, seeds=[3, 4]))


def test_guidance_object_beside_its_shortcuts_is_an_error(real_pipe):
    arguments = {"class_labels": 0, "guidance": ClassifierGuidance(scale=2.0)}
    with pytest.raises(ValueError, match="guidance_scale, clip_order"):
        path(real_pipe, **arguments, guidance_scale=2.0, clip_order="both")
    with pytest.raises(ValueError, match=r"guidance .*cond_fn"):
        path(real_pipe, **arguments, cond_fn=energy)
    with pytest.raises(ValueError, match="2 class_labels, 3 guidance_scale"):
        path(real_pipe, class_labels=[0, 1], guidance=ClassifierGuidance(scale=[1.0, 2.0, 3.0]))


def test_a_list_of_guides_adds_up(make_pipe):
    """Twice the same classifier adds the scales."""
    pipe, _ = guided_pair(make_pipe, DDIMScheduler(**LINEAR, clip_sample=False))
    arguments = {"class_labels": [0, 1], "seeds": [0, 1]}
    both = path(pipe, **arguments, guidance=[ClassifierGuidance(scale=0.5), ClassifierGuidance(scale=1.25)])
    torch.testing.assert_close(both, path(pipe, **arguments, guidance_scale=1.75), atol=1e-9, rtol=0)


# Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": 2.0}, "class_labels"),
        ({"max_gradient_norm": 1.0}, "class_labels"),
        ({"class_labels": [0, 3]}, r"class_labels.* -1\.\.2, .*\[0, 3\]"),
        ({"class_labels": -2}, r"class_labels.* -1\.\.2, .*\[-2\]"),
        ({"class_labels": [0.5]}, "class_labels"),
        ({"class_labels": [0, 1], "guidance_scale": [1.0, 2.0, 3.0]}, "2 class_labels, 3 guidance_scale"),
        ({"class_labels": 0, "guidance_scale": [[1.0]]}, r"guidance_scale.*\(1, 1\)"),
        ({"class_labels": 0, "guidance_mode": "mean"}, "guidance_mode.*'mean'"),
        ({"class_labels": 0, "clip_order": "never"}, "clip_order.*'never'"),
        ({"cond_fn": energy, "guidance_mode": "mean_shift", "clip_order": "both"}, "clip_order.*mean_shift"),
        ({"class_labels": 0, "guidance_interval": (600, 200)}, r"guidance_interval.*\(600, 200\)"),
        ({"class_labels": 0, "guidance_interval": 3}, r"guidance_interval.*got 3"),
        ({"class_labels": 0, "guidance_interval": (1, 2, 3)}, r"guidance_interval.*\(1, 2, 3\)"),
        ({"class_labels": 0, "guidance_scale": "much"}, "guidance_scale.*much"),
        ({"class_labels": 0, "max_gradient_norm": 0.0}, "max_gradient_norm.*0.0"),
        ({"class_labels": 0, "guidance_through_unet": True}, "guidance_through_unet"),
        ({"class_labels": 0, "cond_fn": energy}, "class_labels.*num_class_embeds"),
        ({"cond_fn": lambda x_t, t, x0: x_t.sum()}, r"\(1,\), .*\(\)"),
        ({"cond_fn": lambda x_t, t, x0: x_t.detach().flatten(1).sum(1)}, r"cond_fn .*\(1,\) .*requires_grad=False"),
        ({"cond_fn": lambda x_t, t, x0: None}, "cond_fn must return a tensor .*got NoneType"),
        ({"guidance": "text"}, "an object such as ClassifierGuidance"),
        ({"guidance": [ClassifierGuidance]}, "an object such as ClassifierGuidance"),
        (
            {"class_labels": 0, "latents": torch.zeros(1, 3, 16, 16)},
            r"sample_size=\(8, 8\), .*\(16, 16\)",
        ),
    ],
)
def test_contradictions_are_named(real_pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        path(real_pipe, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [{"guidance_scale": 1.0, "clip_order": "both"}, {"clip_order": "both"}, {"guidance_interval": (0, 10)}],
)
def test_guidance_without_a_guide_is_an_error(make_pipe, arguments):
    with pytest.raises(ValueError, match=r"classifier .*cond_fn"):
        path(make_pipe(DDIMScheduler(), num_class_embeds=3), class_labels=0, **arguments)


def test_differs_a_scale_without_a_guide_is_refused(make_pipe):
    with pytest.raises(ValueError, match=r"classifier .*cond_fn"):
        path(make_pipe(DDIMScheduler()), guidance_scale=7.5)


def test_shortcuts_with_their_defaults_ask_for_nothing(make_pipe):
    defaults = {"guidance_mode": "score", "clip_order": "after", "guidance_through_unet": False}
    pipe = make_pipe(DDIMScheduler())
    assert torch.equal(path(pipe, seeds=[0], **defaults), path(pipe, seeds=[0]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"in_channels": 1}, "in_channels=1, .* 3"),
        ({"num_classes": 4}, "num_classes=4, .* 3"),
        ({"sample_size": 4}, r"sample_size=\(4, 4\), .*\(8, 8\)"),
    ],
)
def test_classifier_of_other_images_or_classes(make_pipe, config, message):
    pipe = make_pipe(DDIMScheduler(), num_class_embeds=3)
    pipe.register_modules(classifier=HeadClassifier(**config))
    with pytest.raises(ValueError, match=message):
        path(pipe, class_labels=0)


def own_rows(solver, guidance_scale=None):
    """The solver's own rows, as if they had been fitted."""
    spacing = solver.config.timestep_spacing
    return fitted_scheduler(solver, (guidance_scale, 3), spacing=spacing, factor=1.0)


@pytest.mark.parametrize(
    ("fitted", "arguments", "warned"),
    [
        (None, {}, None),
        (None, {"class_labels": 1, "guidance_scale": 0.0}, None),
        (None, {"class_labels": 1, "guidance_scale": 2.0}, "without guidance"),
        (0.1, {"class_labels": 1, "guidance_scale": 0.1}, None),
        (0.1, {"class_labels": 1}, "guidance_scale=0.1"),
        (0.1, {"class_labels": [1, 1], "guidance_scale": [0.1, 0.2]}, "guidance_scale=0.1"),
        (0.1, {}, "guidance_scale=0.1"),
    ],
)
def test_rows_fitted_under_another_scale_are_warned_of_once(real_pipe, caplog, fitted, arguments, warned):
    solver = DPMSolverScheduler()
    for scheduler in (solver, own_rows(solver, fitted)):
        pipeline_dpm.warn_once.cache_clear()
        real_pipe.scheduler = scheduler
        for _ in range(2):
            real_pipe(num_inference_steps=3, output_type="pt", seeds=[0, 1], **arguments)
        messages = [record.getMessage() for record in caplog.records if "fitted" in record.getMessage()]
        assert len(messages) == (scheduler is not solver and warned is not None)
    assert warned is None or warned in messages[0]


def test_rows_fitted_to_steps_that_clip_keep_clipping(real_pipe):
    real_pipe.scheduler = own_rows(DPMSolverScheduler(clip_sample=True))
    arguments = {"class_labels": [0, 1], "num_inference_steps": 3}
    assert path(real_pipe, **arguments, clip_order="both").isfinite().all()
    with pytest.raises(ValueError, match=r'clip_order .*"after" or "both"'):
        path(real_pipe, **arguments, clip_order="before")


def test_labels_that_are_embeddings_cannot_guide(make_pipe):
    pipe = make_pipe(DDIMScheduler(), class_embed_type="identity")
    pipe.register_modules(classifier=HeadClassifier())
    with pytest.raises(ValueError, match="class_labels"):
        path(pipe, class_labels=torch.ones(1, 32))
    assert path(pipe, class_labels=torch.ones(1, 32), guidance_scale=0).isfinite().all()


def test_a_gradient_that_is_not_finite_names_its_step(make_pipe):
    pipe = make_pipe(DDIMScheduler())
    pipe.register_modules(classifier=HeadClassifier(broken_below=300))
    arguments = {"num_inference_steps": 5, "class_labels": [0, 1]}  # timesteps 800, 600, 400, 200, 0
    with pytest.raises(ValueError, match=r"step_index 3.*timestep 200"):
        path(pipe, **arguments)
    assert path(pipe, **arguments, guidance_interval=(300, 999)).isfinite().all()


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (diffusers.CMStochasticIterativeScheduler(), "prediction_type"),
        (diffusers.IPNDMScheduler(), "prediction_type"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_schedulers_that_cannot_be_guided(make_pipe, scheduler, message):
    pipe = make_pipe(scheduler)
    with pytest.raises(ValueError, match=message):
        path(pipe, cond_fn=energy)
