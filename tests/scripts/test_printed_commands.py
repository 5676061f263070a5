"""Every command that a script prints works as typed: what comes next, and what mends an error.

Each test is a situation of a user, who types nothing but the first command and what the scripts ask for.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from sd3_lora.stage_one.image_files import hash_file

import pytest
from conftest import TRAINING_SCRIPT, Result, save_pictures

EMBED, CACHE, TRAIN, DRAW = "compute_embeddings", "precompute_latents", TRAINING_SCRIPT, "inference"
COMMAND = re.compile(r"^next[^:\n]*: (python .*)$|`(python [^`]*\.py [^`]*)`", re.MULTILINE)
# Beside what is printed, so that it takes a second.
SHORT: dict[str, list[object]] = {
    EMBED: [],
    CACHE: [],
    TRAIN: ["--max_train_steps", 1, "--report_to", "none", "--resume_from_checkpoint", "latest"],
    DRAW: ["--num_steps", 1, "--guidance", 1],
}


@dataclass
class User:
    """Someone in a folder of their own, who types what is printed."""

    script: Callable[..., Result]
    model: list[object]
    typed: list[str] = field(default_factory=list)

    def type(self, name: str, *words: object, code: int = 0) -> Result:
        """Types a command of their own."""
        result = self.script(name, *self.model, *words, *SHORT[name])
        assert result.code == code, result.out + result.err
        return result

    def follow(self, result: Result, script: str) -> Result:
        """Types the one command that was printed, which is of this script."""
        commands = ["".join(found) for found in COMMAND.findall(result.out + result.err)]
        assert len(commands) == 1, result.out + result.err
        python, name, *words = shlex.split(commands[0])
        assert (python, name) == ("python", f"{script}.py")
        self.typed.append(commands[0])
        followed = self.script(script, *words, *SHORT[script])
        assert followed.code == 0, commands[0] + "\n" + followed.out + followed.err
        return followed

    def follow_to_pictures(self, result: Result, *scripts: str) -> Result:
        """Types all that is printed, to the drawn pictures; returns what training printed."""
        for script in (*scripts, DRAW):
            before, result = result, self.follow(result, script)
        assert "wrote 1 picture to images" in result.out
        assert "no text encoder is loaded" in result.out or " to encode, " in result.out
        return before


@pytest.fixture
def user(script: Callable[..., Result], tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> User:
    monkeypatch.chdir(tmp_path)
    save_pictures(tmp_path / "d", [(64, 64), (70, 64), (64, 100)])
    return User(script, ["--pretrained_model_name_or_path", tiny_sd3, "--device", "cpu"])


PROMPT = ["--instance_prompt", "a photo of sks dog"]


def flags_of(command: str) -> set[str]:
    """The flags of a command with their values."""
    return {f"--{flag}" for flag in command.split(" --")[1:]}


def test_pictures_in_subfolders(user: User) -> None:
    Path("d/10_dog").mkdir()
    Path("d/01.png").rename("d/10_dog/01.png")
    embedded = user.type(EMBED, "--instance_data_dir", "d", *PROMPT, "--recursive")
    assert "3 pictures in d" in embedded.out
    assert "3 pictures at 64 px" in user.follow_to_pictures(embedded, CACHE, TRAIN).out
    assert all("--recursive --device cpu" in command for command in user.typed[:2])


def test_folders_of_the_user_s_own(user: User) -> None:
    """With all that a shell would read otherwise."""
    Path("d").rename("my dog's $HOME")
    Path("my dog's $HOME/01.txt").write_text('sks dog at "sea" & `shore`')
    words = ["--instance_data_dir", "my dog's $HOME", "--instance_prompt", 'it\'s "sks" dog; *']
    embedded = user.type(EMBED, *words, "--output_path", "out put/e.parquet")
    trained = user.follow_to_pictures(embedded, CACHE, TRAIN)
    assert "3 pictures at 64 px" in trained.out
    assert not Path("latents").exists()
    assert Path("out put/latents").is_dir()


def test_embeddings_beside_the_latents_are_those_of_the_same_run(user: User) -> None:
    """Though others of the same pictures lie where they do by default."""
    user.type(EMBED, "--instance_data_dir", "d", *PROMPT)
    user.type(EMBED, "--instance_data_dir", "d", *PROMPT, "--output_path", "own/e.parquet")
    cached = user.type(CACHE, "--instance_data_dir", "d", "--resolution", 64, "--output_path", "own/latents")
    assert "--data_df_path own/e.parquet" in cached.out
    assert "--data_df_path" not in user.type(CACHE, "--instance_data_dir", "d", "--resolution", 64).out


def test_without_any_flag(user: User) -> None:
    Path("d").rename("dog")
    assert "3 pictures at 64 px" in user.follow_to_pictures(user.type(EMBED), CACHE, TRAIN).out


def test_captions_alone(user: User) -> None:
    for number, caption in enumerate(("sks dog at home", "sks dog at sea", "sks dog")):
        Path(f"d/{number:02d}.txt").write_text(caption)
    user.follow_to_pictures(user.type(EMBED, "--instance_data_dir", "d"), CACHE, TRAIN)
    assert "--prompt 'sks dog' " in user.typed[-1] + " "


def save_concepts() -> None:
    save_pictures(Path("cat"), [(64, 64), (64, 64)], seed=7)
    entries = [
        {"instance_prompt": "a photo of sks dog", "instance_data_dir": "d"},
        {"instance_prompt": "a photo of zwx cat", "instance_data_dir": "cat", "repeats": 2},
    ]
    Path("my concepts.json").write_text(json.dumps(entries))


def test_concepts(user: User) -> None:
    save_concepts()
    embedded = user.type(EMBED, "--concepts_list", "my concepts.json")
    assert "5 pictures at 64 px" in user.follow_to_pictures(embedded, CACHE, TRAIN).out
    assert all("--concepts_list 'my concepts.json'" in command for command in user.typed[:2])


def test_concepts_from_training_on(user: User) -> None:
    """Which asks for the embeddings; then for those of a concept that came later."""
    save_concepts()
    user.type(CACHE, "--concepts_list", "my concepts.json")
    embeddings = ["--data_df_path", "e.parquet"]
    words = ["--concepts_list", "my concepts.json", *embeddings]
    stopped = user.type(TRAIN, *words, code=2)
    user.follow(stopped, EMBED)
    assert "--instance_prompt" not in user.typed[-1]
    Path("my concepts.json").write_text(Path("my concepts.json").read_text().replace("zwx", "ohw"))
    stopped = user.type(TRAIN, *words, code=2)
    assert "lacks 'a photo of ohw cat'" in stopped.err
    user.follow(stopped, EMBED)
    user.type(TRAIN, *words)
    assert "5 pictures at 64 px" in user.type(TRAIN, *embeddings, "--output_dir", "other").out  # the file knows them


def test_repeats_in_folder_names(user: User) -> None:
    Path("root").mkdir()
    Path("d").rename("root/10_sks dog")
    embedded = user.type(EMBED, "--instance_data_dir", "root", "--repeats_from_folders")
    assert "3 pictures at 64 px" in user.follow_to_pictures(embedded, CACHE, TRAIN).out
    assert all("--repeats_from_folders" in command for command in user.typed[:2])


@pytest.mark.parametrize("is_default", [True, False])
def test_caption_flags(user: User, is_default: bool) -> None:
    """They are repeated on the way; without the folder they are of the one that stage one read."""
    Path("d/00.txt").write_text("[trigger], sea, sand\n[trigger] at home")
    folder: list[object] = [] if is_default else ["--instance_data_dir", "d", *PROMPT]
    if is_default:
        Path("d").rename("dog")
    words = ["--shuffle_tags", 2, "--keep_tags", 1, "--trigger_word", "sks dog", "--caption_suffix", ", oil"]
    embedded = user.type(EMBED, *folder, *words, "--repeats", 2)
    assert "1 picture with several captions, which training takes in turn" in embedded.out
    user.follow_to_pictures(embedded, CACHE, TRAIN)
    expected = {
        "--shuffle_tags 2",
        "--keep_tags 1",
        "--trigger_word 'sks dog'",
        "--caption_suffix ', oil'",
        "--repeats 2",
    }
    assert all(expected <= flags_of(command) for command in user.typed[:2])
    others = ["--trigger_word", "zwx", "--output_dir", "other"]
    stopped = user.type(TRAIN, *others, code=2)
    assert "lacks 'zwx" in stopped.err
    user.follow(stopped, EMBED)
    user.type(TRAIN, *others)


def test_captions_without_the_flags_of_then(user: User) -> None:
    """The command that mends it has this command's flags, not those that stage one was given."""
    Path("d/00.txt").write_text("sks dog at sea")
    user.type(EMBED, "--instance_data_dir", "d", *PROMPT, "--caption_prefix", "art of")
    user.type(CACHE, "--instance_data_dir", "d")
    stopped = user.type(TRAIN, "--instance_data_dir", "d", code=2)
    assert "lacks 'sks dog at sea'" in stopped.err
    user.follow(stopped, EMBED)
    assert "art of" not in user.typed[-1]
    user.type(TRAIN, "--instance_data_dir", "d")


def test_latents_first(user: User) -> None:
    """What the cache was made with is repeated on the way."""
    cached = user.type(CACHE, "--instance_data_dir", "d", "--resolution", 32, "--num_crops", 2, "--random_flip")
    assert "next, with a prompt of your own: " in cached.out
    trained = user.follow_to_pictures(cached, EMBED, CACHE, TRAIN)
    assert "3 pictures at 32 px" in trained.out
    assert {"--num_crops 2", "--random_flip"} <= flags_of(user.typed[1]) & flags_of(user.typed[2])


def test_a_broken_picture(user: User) -> None:
    Path("d/b.jpg").write_text("<html>403</html>")
    user.type(EMBED, "--instance_data_dir", "d", *PROMPT)
    cached = user.type(CACHE, "--instance_data_dir", "d", "--skip_broken")
    trained = user.follow_to_pictures(cached, TRAIN)
    skipped = "skipped: d/b.jpg does not decode (not a picture in a known format)\n"
    assert skipped in trained.out
    assert "3 pictures at 64 px" in trained.out
    for words in ([], ["--instance_data_dir", "d"]):  # neither the folder nor the flag is needed
        trained = user.type(TRAIN, *words, "--output_dir", f"lora{len(words)}")
        assert skipped in trained.out
        assert "3 pictures at 64 px" in trained.out


def test_a_new_picture_beside_a_broken_one(user: User) -> None:
    """The command that mends it repeats what the cache was made with."""
    Path("d/b.jpg").write_text("<html>403</html>")
    user.type(EMBED, "--instance_data_dir", "d", *PROMPT)
    user.type(CACHE, "--instance_data_dir", "d", "--skip_broken", "--alpha_background", "mean", "--num_crops", 2)
    save_pictures(Path("new"), [(64, 64)], seed=5)
    Path("new/00.png").rename("d/new.png")
    stopped = user.type(TRAIN, "--instance_data_dir", "d", code=2)
    assert "latents has no latents of new.png" in stopped.err
    mended = user.follow(Result(2, "", stopped.err), CACHE)
    assert {"--alpha_background mean", "--num_crops 2", "--skip_broken"} <= flags_of(user.typed[-1])
    assert "wrote 1 crop of 1 picture" in mended.out
    assert "3 pictures at 64 px" in user.type(TRAIN).out  # the embeddings file knows three
    assert "4 pictures at 64 px" in user.type(TRAIN, "--instance_data_dir", "d", "--output_dir", "lora").out


def test_embeddings_that_are_not_there(user: User) -> None:
    user.type(CACHE, "--instance_data_dir", "d")
    stopped = user.type(TRAIN, "--instance_data_dir", "d", code=2)
    assert '02.png have no caption: type --instance_prompt "a photo of sks dog"' in stopped.err
    made = user.type(TRAIN, "--instance_data_dir", "d", *PROMPT)
    (line,) = (line for line in made.out.splitlines() if "in a process of its own" in line)
    assert line.startswith("sample_embeddings.parquet is not there yet; in a process of its own: python compute_embedd")
    Path("sample_embeddings.parquet").unlink()  # its record is there
    stopped = user.type(TRAIN, "--output_dir", "other", code=2)
    user.follow(stopped, EMBED)
    assert "--instance_data_dir d --instance_prompt 'a photo of sks dog'" in user.typed[-1]
    user.type(TRAIN, "--output_dir", "other")


@pytest.mark.parametrize("has_record", [True, False])
def test_a_caption_that_came_later(user: User, has_record: bool) -> None:
    """The prompt of the other pictures is the embeddings file's, the prompts to draw are its record's."""
    words = ["--instance_data_dir", "d", "--validation_prompt", "sks dog in a bucket", "sks dog at home"]
    user.type(CACHE, "--instance_data_dir", "d")
    user.type(EMBED, *words, *PROMPT)
    if not has_record:
        Path("sample_embeddings.json").unlink()
    Path("d/01.txt").write_text("a photo of sks dog at sea")
    stopped = user.type(TRAIN, "--instance_data_dir", "d", code=2)
    assert "lacks 'a photo of sks dog at sea'" in stopped.err
    user.follow(stopped, EMBED)
    assert ("--validation_prompt 'sks dog in a bucket' 'sks dog at home'" in user.typed[-1]) == has_record
    user.type(TRAIN, "--instance_data_dir", "d")
    trained = user.type(TRAIN, "--output_dir", "other")
    assert json.loads(Path("other/run.json").read_text())["trigger"] == "a photo of sks dog"
    user.follow(trained, DRAW)


def test_another_prompt_without_the_folder(user: User) -> None:
    user.type(EMBED, "--instance_data_dir", "d", *PROMPT)
    user.type(CACHE, "--instance_data_dir", "d")
    stopped = user.type(TRAIN, "--instance_prompt", "a photo of zwx dog", code=2)
    assert "describes no picture with 'a photo of zwx dog'" in stopped.err
    assert "3 prompts" in user.follow(stopped, EMBED).out
    user.type(TRAIN, "--instance_prompt", "a photo of zwx dog")


def test_latents_that_are_gone_are_named_without_the_folder(user: User) -> None:
    user.type(EMBED, "--instance_data_dir", "d", *PROMPT)
    user.type(CACHE, "--instance_data_dir", "d")
    gone = Path("latents") / f"{hash_file(Path('d/02.png'))}.safetensors"
    gone.unlink()
    stopped = user.type(TRAIN, code=2)
    assert "latents has no latents of 02.png (a new or changed picture): type" in stopped.err
    assert "wrote 3 crops of 1 picture" in user.follow(stopped, CACHE).out
    assert gone.exists()
    user.type(TRAIN)


@pytest.mark.parametrize(
    ("words", "said", "mended_by"),
    [
        (["--resolution", 32], "was made with resolution 64, not 32", CACHE),
        (["--max_sequence_length", 20], "was made with max_sequence_length 77, not 20", EMBED),
        (["--num_crops", 5], "lacks the crop", CACHE),
        (["--random_flip"], "lacks the crop", CACHE),
    ],
)
def test_other_flags_in_training(user: User, words: list[object], said: str, mended_by: str) -> None:
    user.type(EMBED, "--instance_data_dir", "d", *PROMPT, "--class_prompt", "a dog")
    user.type(CACHE, "--instance_data_dir", "d", "--vae_batch_size", 2)
    stopped = user.type(TRAIN, *words, code=2)
    assert said in stopped.err
    user.follow(stopped, mended_by)
    for folder in ([], ["--instance_data_dir", "d"]):
        user.type(TRAIN, *folder, *words, "--output_dir", f"lora{len(folder)}")


def test_class_pictures(user: User) -> None:
    """What stage one was told of them, training is told too; where they have no prompt yet, that is asked for."""
    save_pictures(Path("dogs"), [(64, 64), (64, 64)], seed=1)
    words = ["--instance_data_dir", "d", "--class_data_dir", "dogs", "--num_class_images", 2]
    cached = user.type(CACHE, *words)
    assert "next, with prompts of your own: " in cached.out
    embedded = user.follow(cached, EMBED)
    assert "--class_prompt 'a photo of a dog'" in user.typed[0]
    trained = user.follow_to_pictures(embedded, CACHE, TRAIN)
    assert "3 pictures and 2 class pictures at 64 px" in trained.out
    prior = "--with_prior_preservation --class_prompt 'a photo of a dog' --class_data_dir dogs --num_class_images 2"
    assert prior in user.typed[2]


def test_concepts_with_classes_of_their_own(user: User) -> None:
    """The list names class pictures, so training is told to take them."""
    save_concepts()
    path = Path("my concepts.json")
    entries = json.loads(path.read_text())
    save_pictures(Path("animals"), [(64, 64)] * 100, seed=1)
    for entry in entries:
        entry |= {"class_prompt": "a photo of an animal", "class_data_dir": "animals"}
    path.write_text(json.dumps(entries))
    embedded = user.type(EMBED, "--concepts_list", path)
    trained = user.follow_to_pictures(embedded, CACHE, TRAIN)
    assert "--with_prior_preservation" in user.typed[1]
    assert "5 pictures and 100 class pictures at 64 px" in trained.out
    assert "--class_captions" not in user.typed[1]
    Path("animals/00.txt").write_text("an animal on grass")
    captioned = user.follow(user.type(EMBED, "--concepts_list", path, "--class_captions"), CACHE)
    assert {"--with_prior_preservation", "--class_captions"} < flags_of(COMMAND.findall(captioned.out)[0][0])
    del entries[1]["class_prompt"]
    path.write_text(json.dumps(entries))
    assert "--with_prior_preservation" not in user.type(CACHE, "--concepts_list", path).out


def test_class_pictures_with_captions(user: User) -> None:
    """Where stage one embedded them, training is told to read them; one that came later is embedded first."""
    save_pictures(Path("dogs"), [(64, 64), (64, 64)], seed=1)
    Path("dogs/00.txt").write_text("a dog on grass")
    words = ["--instance_data_dir", "d", *PROMPT, "--class_prompt", "a dog"]
    embedded = user.type(EMBED, *words, "--class_captions", "--class_data_dir", "dogs")
    cached = user.follow(embedded, CACHE)
    assert "--class_data_dir dogs" in user.typed[-1]
    Path("dogs/01.txt").write_text("a dog at sea")
    later = user.type(CACHE, "--instance_data_dir", "d", "--class_data_dir", "dogs", "--num_class_images", 2)
    trained = user.follow_to_pictures(later, EMBED, CACHE, TRAIN)
    assert "--class_captions --class_data_dir dogs" in user.typed[1]
    assert "--class_captions" in user.typed[3]
    assert "3 pictures and 2 class pictures at 64 px" in trained.out
    assert "which is not read" not in trained.out
    assert {"--class_captions"} < flags_of(COMMAND.findall(cached.out)[0][0])


def test_prompts_of_class_pictures_to_be_drawn(user: User) -> None:
    save_pictures(Path("dogs"), [(64, 64)], seed=1)
    Path("prompts.txt").write_text("a dog on grass\n")
    Path("dogs/00.txt").write_text("a dog at sea")  # which nobody has embedded
    user.type(
        EMBED, "--instance_data_dir", "d", *PROMPT, "--class_prompt", "a dog", "--class_prompts_file", "prompts.txt"
    )
    cached = user.type(CACHE, "--instance_data_dir", "d", "--class_data_dir", "dogs", "--num_class_images", 1)
    trained = user.follow_to_pictures(cached, EMBED, CACHE, TRAIN)
    assert "--class_captions --class_prompts_file prompts.txt" in user.typed[2]
    assert "3 pictures and 1 class picture at 64 px" in trained.out


def test_class_pictures_whose_prompt_is_not_embedded(user: User) -> None:
    save_pictures(Path("dogs"), [(64, 64), (64, 64)], seed=1)
    user.type(EMBED, "--instance_data_dir", "d", *PROMPT)
    cached = user.type(CACHE, "--instance_data_dir", "d", "--class_data_dir", "dogs", "--num_class_images", 2)
    assert "next, with a class prompt of your own: " in cached.out
    trained = user.follow_to_pictures(cached, EMBED, CACHE, TRAIN)
    assert "3 pictures and 2 class pictures at 64 px" in trained.out


def test_captions_that_are_all_equal(user: User) -> None:
    """They are one prompt, which may be the class's too."""
    for number in range(3):
        Path(f"d/{number:02d}.txt").write_text("a dog\na dog\n")
    embedded = user.type(EMBED, "--instance_data_dir", "d", "--class_prompt", "a dog")
    assert "2 prompts, 0 of them done before" in embedded.out
    user.follow_to_pictures(embedded, CACHE, TRAIN)
    again = user.type(TRAIN, "--instance_data_dir", "d", "--prior_term", "prediction", "--output_dir", "other")
    assert "3 pictures at 64 px" in again.out
