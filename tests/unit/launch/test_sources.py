"""What a server cannot serve is sent to the one that can."""

from pathlib import Path

import pytest

from launch.sources import Refused
from tests.unit.launch.test_serving import HUB, SERVERS, shown, write_model, write_run


@pytest.mark.parametrize("engine", SERVERS)
def test_an_export_of_gguf_files_goes_to_their_servers(tmp_path: Path, engine: str) -> None:
    """The refusal is the command for this very folder or file; Ollama is named where there is a Modelfile."""
    folder = tmp_path / "an export"
    folder.mkdir()
    (folder / "a100-Q8_0.gguf").touch()
    llama, ollama = f"bash launch/serve_llama_cpp.sh '{folder}", f"bash launch/serve_ollama.sh '{folder}"
    for place in (folder, folder / "a100-Q8_0.gguf"):
        with pytest.raises(Refused) as refused:
            shown(engine, place)
        assert llama in str(refused.value)
        assert ollama not in str(refused.value)
    (folder / "Modelfile").touch()
    with pytest.raises(Refused, match=f"{ollama}'"):
        shown(engine, folder)


@pytest.mark.parametrize("engine", ["llama_cpp", "ollama"])
def test_a_folder_of_safetensors_goes_to_its_servers(tmp_path: Path, engine: str) -> None:
    """A merged model and an exported adapter go to vLLM; a run is exported; an adapter's GGUF file is no model."""
    run = write_run(tmp_path / "a100", HUB)
    merged = write_model(tmp_path / "merged")
    for folder in (merged, run / "final"):
        (folder / "a100-adapter.gguf").touch()
        with pytest.raises(Refused, match=f"bash launch/serve_vllm.sh {folder}; `handloop export RUN --format ollama"):
            shown(engine, folder)
    with pytest.raises(Refused, match=f"`handloop export {run} --format ollama"):
        shown(engine, run)
    with pytest.raises(Refused, match=r"name a folder, or a \.gguf file"):
        shown(engine, tmp_path / "nowhere")
