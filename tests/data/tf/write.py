"""The tensor bundle beside this file: OpenAI's names, written by TensorFlow 2.21 itself, variables on three devices.

python write.py .        # needs tensorflow-cpu
"""

import sys

import numpy as np
import tensorflow as tf

v1, out = tf.compat.v1, sys.argv[1]
v1.disable_eager_execution()
d, H, L, N, V = 8, 2, 2, 4, 4
shapes = {"wpe": (N, d), "wte": (V, d), "wtet": (V, d), "sos": (d,), "ln_f/g": (d,)}
for i in range(L):
    shapes |= {f"h{i}/ln_{j}/g": (d,) for j in (1, 2)}
    shapes |= {f"h{i}/attn/{p}_proj": (H, d // H, d) for p in "qkvc"}
    shapes |= {f"h{i}/mlp/c_fc/w": (d, 4 * d), f"h{i}/mlp/c_proj/w": (4 * d, d)}
rng = np.random.default_rng(0)
with v1.Session(config=v1.ConfigProto(device_count={"CPU": 3})) as session:
    variables = []
    for k, (name, shape) in enumerate(shapes.items()):
        value = rng.standard_normal(shape).astype(np.float32) * 0.3
        with tf.device(f"/cpu:{k % 3}"), v1.variable_scope("model", reuse=v1.AUTO_REUSE):
            variables.append(v1.get_variable(name, initializer=value))
    step = v1.train.get_or_create_global_step()
    loss = tf.add_n([tf.reduce_sum(v * v) for v in variables[:2]])
    train = v1.train.AdamOptimizer(0.1, beta2=0.95).minimize(loss, global_step=step)
    session.run(v1.global_variables_initializer())
    session.run(train)
    saver = v1.train.Saver(sharded=True)
    saver.save(session, f"{out}/model.ckpt", global_step=step, write_meta_graph=False)
    np.savez(f"{out}/values.npz", **{v.op.name: session.run(v) for v in variables})
