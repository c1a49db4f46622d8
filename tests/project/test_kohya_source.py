"""Commands for three shells, config files and the GUI's settings say the same options."""

import json

import pytest

from sd3pipe.errors import ParameterError
from sd3pipe.project.kohya import translate
from sd3pipe.project.kohya_source import read_command, read_source

WANTED = {
    "pretrained_model_name_or_path": r"D:\models\sd3.5_medium.safetensors",
    "train_data_dir": r"D:\my pictures",
    "network_dim": 8,
    "enable_bucket": True,
    "resolution": [512, 768],
    "lr_warmup_steps": 0.1,
    "network_args": ["split_qkv=True", "rank_dropout=0.1"],
}
OPTIONS = (
    r"--pretrained_model_name_or_path{=}D:\models\sd3.5_medium.safetensors",
    r"--train_data_dir{=}{mark}D:\my pictures{mark}",
    "--network_dim 8",
    "--enable_bucket",
    "--resolution=512,768 --lr_warmup_steps 10%",
    "--network_args split_qkv=True {mark}rank_dropout=0.1{mark}",
)


@pytest.mark.parametrize(
    ("start", "end", "mark", "equals"),
    [
        ("accelerate launch --num_cpu_threads_per_process=1 ", "^", '"', " "),
        (r".\venv\Scripts\accelerate.exe launch ", "^", '"', "="),
        (r"& 'C:\Program Files\python.exe' -m accelerate.commands.launch ", "`", "'", " "),
        ("accelerate launch ", "`", '"', "="),
    ],
)
def test_windows_commands_keep_their_backslashes(start, end, mark, equals):
    lines = [option.replace("{=}", equals).replace("{mark}", mark) for option in OPTIONS]
    text = f" {end}\r\n  ".join([f"{start}sd3_train_network.py", *lines]) + "\r\npause\r\n"
    assert read_command(text) == WANTED


def test_a_bash_script_is_read_up_to_what_follows_the_command(tmp_path):
    script = tmp_path / "train.sh"
    script.write_text(
        "#!/bin/bash\ncd /sd-scripts\n# sd3_train_network.py, third try\n"
        "accelerate launch sd3_train_network.py \\\n  --network_dim 8 --output_name 'my cat' \\\n"
        '  --train_data_dir "/data/my pictures" --learn 1e-4 2>&1 | tee log.txt\necho done\n'
    )
    assert read_source([str(script)]) == {
        "network_dim": 8, "output_name": "my cat", "train_data_dir": "/data/my pictures", "learning_rate": 1e-4,
    }  # fmt: skip


def test_a_value_with_spaces_and_no_quotes_is_named():
    with pytest.raises(ParameterError, match=r"--train_data_dir: pics stands alone behind .*put a value with spaces"):
        read_command(r"sd3_train_network.py --train_data_dir C:\my pics")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("REM sd3_train_network.py --seed 1\nsd3_train_network.py --seed 2", {"seed": 2}),
        (":: sd3_train_network.py --seed 1\n  # sd3_train_network.py --vae a\nsd3_train_network.py", {}),
        ("python setup.py && cd x; python sd3_train_network.py --seed 2; echo done", {"seed": 2}),
        ("echo 'now sd3_train_network.py'\nsd3_train_network.py --enable_bucket; echo", {"enable_bucket": True}),
        ("sd3_train_network.py --network_args a=b 2>log.txt >> x 2>&1|tee log # mine", {"network_args": ["a=b"]}),
        ("sd3_train_network.py --caption_separator ';' --seed 2&", {"caption_separator": ";", "seed": 2}),
        ("sd3_train_network.py --seed 2 \\ \n --output_name a#b \\", {"seed": 2, "output_name": "a#b"}),
        ("sd3_train_network.py --vae '' --seed 2", {"vae": "", "seed": 2}),
        ("sd3_train_network.py --metadata_title 'a\n# b; c' --seed 2", {"metadata_title": "a\n# b; c", "seed": 2}),
        (
            ('NAME="my cat"\nMORE="--seed 2 --vae \'a b\'"\nS=/x/sd3_train_network.py\n'
            'DIM=8 python $S --output_name "${NAME}s" $MORE'),
            {"output_name": "my cats", "seed": 2, "vae": "a b"},
        ),
        (
            ('set NAME=my cat\r\nset "DIR=D:\\pics"\r\n'
            'sd3_train_network.py ^\r\n --output_name "%NAME%" --vae %DIR%\\x\r\npause'),
            {"output_name": "my cat", "vae": "D:\\pics\\x"},
        ),
        ("sd3_train_network.py --lr_warmup_steps 200%", {"lr_warmup_steps": "200%"}),
        ('$d = "C:\\x"\nsd3_train_network.py `\n --vae $d\\v', {"vae": "C:\\x\\v"}),
    ],
)  # fmt: skip
def test_a_script_is_read_as_its_shell_reads_it(text, found):
    assert read_command(text) == found


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("sd3_train_network.py --seed 1\nsd3_train_network.py --seed 2", "^2 commands of .* a project is one training"),
        ("sd3_train_network.py\n --seed 1", "^--seed 1: begins a line of its own"),
        ("sd3_train_network.py --seed 1 \\\n # --vae a \\\n --dim 2", "^--dim 2: begins a line of its own"),
        ("sd3_train_network.py --output_name %N% --vae ${M:-x} --seed $1", r"^%N%, \$\{M:-x\}, \$1: nothing here"),
        ("sd3_train_network.py --vae \u201c/my vae\u201d", "^\u201c/my: has quotes, dashes or spaces as web pages"),
        ("sd3_train_network.py --enable_bucket \u2014seed 1", "^\u2014seed: has quotes, dashes"),
        ("sd3_train_network.py --seed\xa01", "has quotes, dashes or spaces"),
        ('sd3_train_network.py --vae D:\\a --output_name "cat', "cannot be split into words"),
    ],
)  # fmt: skip
def test_what_cannot_be_the_command_that_ran_is_named(text, told):
    with pytest.raises(ParameterError, match=told):
        read_command(text)


def test_a_command_in_a_file_of_any_name_is_read(tmp_path):
    (tmp_path / "train.command").write_text("cd /elsewhere && python sd3_train_network.py --seed 2")
    assert read_source([str(tmp_path / "train.command")]) == {"seed": 2}


def test_a_change_of_folder_before_the_command_is_told(caplog):
    assert read_command("cd /elsewhere && python sd3_train_network.py --vae v") == {"vae": "v"}
    assert "cd /elsewhere: relative paths count from the current folder" in caplog.text


def test_the_command_line_beats_its_config_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.toml").write_text('[a]\nnetwork_dim = 4\nseed = 7\noptimizer_args = "weight_decay=0.1 eps=1e-8"\n')
    assert read_command("sd3_train_network.py --config_file c --network_dim 8") == {
        "network_dim": 8, "seed": 7, "optimizer_args": ["weight_decay=0.1", "eps=1e-8"],
    }  # fmt: skip


def test_settings_of_the_gui_have_its_own_names_and_empty_fields(tmp_path):
    settings = {
        "sd3_checkbox": True, "max_resolution": "512,768", "epoch": 3, "max_train_steps": 0, "optimizer": "AdamW8bit",
        "LoRA_type": "LyCORIS/LoHa", "lr_warmup": 10, "lr_warmup_steps": 0, "noise_offset": 0, "clip_skip": 1,
        "seed": 0, "sd3_clip_l": "", "sd3_t5xxl": "t5.safetensors", "xformers": "sdpa", "network_alpha": 0,
        "t5xxl_max_token_length": 512, "rank_dropout": 0.1, "additional_parameters": "--min_timestep 10 --seed=5",
        "sample_prompts": "a cat --w 512\na dog", "num_processes": 2, "huber_c": 0.1, "network_args": "",
    }  # fmt: skip
    file = tmp_path / "gui.json"
    file.write_text(json.dumps(settings))
    given = read_source([str(file)])
    assert given["resolution"] == [512, 768] and given["max_train_epochs"] == 3 and given["lr_warmup_steps"] == 0.1
    assert given["optimizer_type"] == "AdamW8bit" and given["t5xxl"] == "t5.safetensors" and given["seed"] == 5
    assert given["min_timestep"] == 10 and given["sdpa"] is True
    assert not given.keys() & {"noise_offset", "t5xxl_max_token_length", "clip_l", "num_processes", "max_train_steps"}
    assert "network_alpha" not in given
    result = translate(given)
    assert result.values["train"]["adapter_type"] == "loha"
    assert result.values["train"]["network_args"] == ["rank_dropout=0.1"]
    assert result.prompts == "a cat --w 512\na dog"
    assert not any("clip_skip" in line for line in (*result.lost, *result.changed, *result.idle))


def gui(folder, **settings):
    """Returns the options that the GUI's settings for SD3 stand for."""
    (folder / "gui.json").write_text(json.dumps({"sd3_checkbox": True, **settings}))
    return read_source([str(folder / "gui.json")])


def test_fields_for_lycoris_become_the_network_args_that_the_gui_makes_of_them(tmp_path):
    fields = {
        "LyCORIS_preset": "attn-mlp", "dora_wd": True, "train_norm": True, "use_scalar": True, "use_tucker": False,
        "conv_dim": 0, "module_dropout": 0, "decompose_both": True, "factor": 4, "constrain": 0.5, "rescaled": True,
    }  # fmt: skip
    locon, lokr, oft = (gui(tmp_path, LoRA_type=f"LyCORIS/{kind}", **fields) for kind in ("LoCon", "LoKr", "Diag-OFT"))
    assert set(locon["network_args"]) == {
        "algo=locon", "preset=attn-mlp", "dora_wd=True", "train_norm=True", "use_scalar=True",
    }  # fmt: skip
    assert {"algo=lokr", "factor=4", "decompose_both=True"} < set(lokr["network_args"])
    assert {"algo=diag-oft", "constraint=0.5", "rescaled=True"} < set(oft["network_args"])
    assert translate(locon).values["train"]["adapter_type"] == "dora"
    assert any("constraint" in line for line in translate(oft).lost)
    assert gui(tmp_path, LoRA_type="LyCORIS/LoHa", LyCORIS_preset="full")["network_args"] == ["algo=loha"]
    assert gui(tmp_path, LoRA_type="Standard", block_dims="2,2", dora_wd=True)["network_args"] == ["block_dims=2,2"]


def test_quotes_in_the_gui_s_fields_of_words_are_dropped(tmp_path):
    given = gui(
        tmp_path, optimizer_args='weight_decay="0.05" "betas=0.9,0.95"', lr_scheduler_args='"T_max=5"',
        network_args='"rank_dropout=0.1"',
    )  # fmt: skip
    assert given["optimizer_args"] == ["weight_decay=0.05", "betas=0.9,0.95"]
    assert given["lr_scheduler_args"] == ["T_max=5"] and given["network_args"] == ["rank_dropout=0.1"]


def test_epochs_of_the_gui_count_for_folders_of_pictures_alone(tmp_path, caplog):
    assert gui(tmp_path, epoch=3, train_data_dir="img", max_train_steps=0)["max_train_epochs"] == 3
    assert not caplog.text
    given = gui(tmp_path, epoch=3, dataset_config="d.toml", max_train_steps=0)
    assert translate(given).values["train"]["max_train_steps"] == 1600
    assert "with dataset_config it is 1600 steps" in caplog.text
    assert "max_train_epochs" not in translate(given).values["train"]
    assert gui(tmp_path, epoch=3, dataset_config="d.toml", max_train_steps=50)["max_train_steps"] == 50
    caplog.clear()
    assert gui(tmp_path, dataset_config="d.toml") and not caplog.text


def test_zeros_that_the_gui_hands_to_nobody_are_said(tmp_path, caplog):
    given = gui(tmp_path, max_grad_norm=0, prior_loss_weight=0.0, network_alpha=0, max_data_loader_n_workers=0)
    assert given.keys() & {"max_grad_norm", "prior_loss_weight", "network_alpha"} == set()
    assert given["max_data_loader_n_workers"] == 0
    train = translate(given).values["train"]
    assert train["max_grad_norm"] == train["prior_loss_weight"] == train["network_alpha"] == 1.0
    assert caplog.text.count("the GUI hands no zero on, so it is 1") == 3


def test_fields_of_flux_say_nothing_about_sd3(tmp_path):
    given = gui(tmp_path, clip_l="flux_l.safetensors", t5xxl="flux_t5.safetensors", fp8_base_unet=True)
    assert given.keys() & {"clip_l", "t5xxl", "fp8_base_unet"} == set()


def test_training_text_encoders_alone_is_told(tmp_path):
    of_text = translate(gui(tmp_path, unet_lr=0, text_encoder_lr=1e-4))
    assert any("trains text encoders alone; here the MMDiT is trained" in line for line in of_text.lost)
    assert not any("MMDiT's part is the same" in line for line in of_text.lost)
    of_both = translate(gui(tmp_path, unet_lr=1e-4, text_encoder_lr=1e-4))
    assert any("MMDiT's part is the same" in line for line in of_both.lost)
    assert gui(tmp_path, unet_lr=1e-4, text_encoder_lr=0)["network_train_unet_only"] is True


def test_settings_for_another_model_are_refused(tmp_path):
    for settings, told in (
        ('{"sdxl": true}', "settings for SDXL"),
        ('{"sd3_checkbox": false}', "settings for another model"),
        ('{"sd3_checkbox": true, "learning_rate_te": 0}', "settings to train a whole model"),
    ):
        (tmp_path / "gui.json").write_text(settings)
        with pytest.raises(ParameterError, match=told):
            read_source([str(tmp_path / "gui.json")])


def test_words_that_the_gui_adds_keep_their_backslashes(tmp_path):
    (tmp_path / "gui.json").write_text('{"sd3_checkbox": true, "additional_parameters": "--vae D:\\\\v.safetensors"}')
    assert read_source([str(tmp_path / "gui.json")])["vae"] == r"D:\v.safetensors"


@pytest.mark.parametrize("name, value", [("vae", ["a"]), ("vae", True), ("seed", {"a": 1})])
def test_a_list_where_one_value_is_meant_is_named(tmp_path, name, value):
    (tmp_path / "gui.json").write_text(json.dumps({"sd3_checkbox": True, name: value}))
    with pytest.raises(ParameterError, match=f"^{name} = "):
        read_source([str(tmp_path / "gui.json")])


def test_an_optimizer_with_a_name_of_its_own_here_needs_no_leave():
    for path in ("came_pytorch.CAME", "prodigyplus.ProdigyPlusScheduleFree"):
        found = translate(read_command(f"sd3_train_network.py --optimizer_type {path}"))
        assert found.values["train"]["optimizer_type"] == path.rpartition(".")[2]
        assert not any("--allow-code" in line for line in found.changed)


def test_lycoris_oft_becomes_ours_and_says_what_differs():
    given = read_command(
        "sd3_train_network.py --network_module lycoris.kohya --network_dim 16 --network_alpha 8 "
        "--network_args algo=diag-oft dropout=0.1 module_dropout=0.2 constraint=0.01 rescaled=True"
    )
    found = translate(given)
    train = found.values["train"]
    assert (train["adapter_type"], train["network_dim"]) == ("oft", 16)
    assert train["network_args"] == ["module_dropout=0.2"] and "network_alpha" not in train
    lost = " ".join(found.lost)
    assert "network_args constraint: LyCORIS means it times a layer's rows" in lost and "network_args rescaled" in lost
    assert any("never wider than they are many" in line for line in found.changed)
    plain = translate(read_command("sd3_train_network.py --network_module lycoris.kohya --network_args algo=diag-oft"))
    assert not any("network_args" in line for line in plain.lost) and plain.values["train"]["network_args"] == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--network_module lycoris.kohya --network_args algo=boft", "algo = boft: taken as lora; adapter_type = oft"),
        ("--network_module lycoris.kohya --network_args algo=tlora", "adapter_type = tlora masks them"),
        ("--network_module lycoris.kohya --network_args algo=ia3", "taken as lora; sd3pipe trains lora, dora, loha"),
        ("--network_module networks.oft", "its network_dim is the number of blocks; adapter_type = oft"),
        ("--network_module networks.oft_v2", "taken as networks.lora_sd3; adapter_type = oftv2"),
    ],
)
def test_kinds_that_are_not_translated_say_what_is_near(words, told):
    found = translate(read_command(f"sd3_train_network.py {words}"))
    assert any(told in line for line in [*found.lost, *found.changed])
    assert found.values["train"].get("adapter_type", "lora") == "lora"
