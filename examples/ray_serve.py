"""Two replicas of `tiny` on a local Ray cluster.

pip install 'jaxserve[ray]'
python examples/ray_serve.py
"""

import ray
from ray import serve

from jaxserve.serving.options import EngineOptions
from jaxserve.serving.ray_serve import application
from jaxserve.serving.wire import Start


def main() -> None:
    ray.init(include_dashboard=False, log_to_driver=False)
    try:
        model = Start("tiny", options=EngineOptions(max_sequences=8, max_step_tokens=64))
        app = application(model, num_replicas=2, actor={"num_cpus": 0.5})
        handle = serve.run(app).options(stream=True)
        for prompt in ("def area(w, h):\n    return", "import os\n"):
            print(prompt, end="")
            for delta in handle.generate.remote(prompt, max_tokens=24, temperature=0.0):
                print(delta["text"], end="", flush=True)
            print("\n---")
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
