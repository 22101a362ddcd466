"""BLIP-2's stage 1 of pre-training (arXiv:2301.12597 sec. 3.1), and retrieval with what it made.

    python train.py --model blip2 --stage pretrain1 --output_dir output_stage1

The Q-Former learns from pairs of image and text by three losses: contrast (which text belongs to which
image), matching (does this text belong to this image), captioning. It is the model of a config.json whose
Q-Former takes text (`use_qformer_text_input`); model_blip2.build_model makes it. A segment of the stream is Q
places for queries and then [CLS] text [SEP].
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import parallel
from blip2_language import segments
from kernels.dropout import dropout_rows, mix, name_dropouts
from kernels.linear_cross_entropy import IGNORE_INDEX
from model_blip2 import (
    Blip2Config,
    QFormer,
    QFormerConfig,
    QFormerContext,
    VisionModel,
    encode_queries,
    init_weights,
    spread_keys,
)
from vlm import Batch, move

# Lengths of texts are the host's (vlm.Batch): rows are found there, and no device is waited for.


def interleave(Q: int, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of queries (N*Q,) and of text, and cu_seqlens, of N segments with Q queries and then lengths[n]
    text tokens."""
    # Segment n: Q queries, then its text. Both lists of rows are in the stream's order.
    cu_seqlens, segment = segments(lengths + Q), torch.arange(len(lengths)).repeat_interleave(lengths)
    # (N, Q) -> (N*Q,)
    query_rows = (cu_seqlens[:-1, None].long() + torch.arange(Q)).flatten()
    return query_rows, torch.arange(len(segment)) + Q * (1 + segment), cu_seqlens


def on(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Host tensors of one dtype on a device."""
    return tuple(move({str(n): t for n, t in enumerate(tensors)}, device).values())


def positions_of(lengths: Tensor) -> Tensor:
    """0, 1, ... in each of the texts, one behind the other."""
    starts = segments(lengths)[:-1].repeat_interleave(lengths)
    return torch.arange(len(starts)) - starts


def filled(lengths: Tensor, width: int) -> Tensor:
    """Places in a flat table (N, width) of the first lengths[n] numbers of each of its rows n."""
    return positions_of(lengths) + width * torch.arange(len(lengths)).repeat_interleave(lengths)


class LMPredictions(nn.Module):
    """BERT's head; its vocabulary matrix is the word embedding."""

    def __init__(self, config: QFormerConfig):
        super().__init__()
        C = config.hidden_size
        # Beside the tied matrix, as in BERT's files: cls.predictions.bias.
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.transform = nn.Module()
        self.transform.dense = nn.Linear(C, C)
        self.transform.LayerNorm = nn.LayerNorm(C, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        # dense, gelu, norm, then the vocabulary: (R, C) -> (R, V).
        return F.linear(self.transform.LayerNorm(F.gelu(self.transform.dense(x))), weight, self.bias)


class Blip2Qformer(nn.Module):
    prefill = "alone"  # a prompt enters the engine whole, without running sequences: queries see one another
    LOSSES = ("itc", "itm", "lm")
    pipeline_obstacle = "stage=pretrain1 passes an image's features to every layer in several passes"
    position_step, position_axes, prefix_rows = 1, 1, 0
    encoder_decoder = False
    # Not -inf: a row in which all are masked still has a softmax.
    MASKED = -10000.0  # added to similarities that may not be drawn
    SMOOTHING = 0.1  # of contrastive and language-modelling targets

    def __init__(self, config: Blip2Config):
        super().__init__()
        self.config = config
        q, C = config.qformer, config.qformer.hidden_size
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, C))
        self.vision_model = VisionModel(config.vision)
        self.qformer = QFormer(q)
        self.embeddings = nn.Module()
        self.embeddings.word_embeddings = nn.Embedding(q.vocab_size, C)
        self.embeddings.position_embeddings = nn.Embedding(q.max_position_embeddings, C)
        # To the space in which images and texts are compared, 256 wide.
        self.vision_projection = nn.Linear(C, config.image_text_hidden_size)
        self.text_projection = nn.Linear(C, config.image_text_hidden_size)
        self.itm_head = nn.Linear(C, 2)
        # Published retrieval models lack both: they can rank, not go on training.
        if config.stage1_heads:
            # LAVIS's has no dimension, which fully_shard can't take
            self.temp = nn.Parameter(torch.full((1,), 0.07))
            self.cls = nn.Module()
            self.cls.predictions = LMPredictions(q)
        name_dropouts(self)

    @property
    def num_image_tokens(self) -> int:
        return self.config.num_query_tokens

    @property
    def image_size(self) -> tuple[int, int]:
        return self.config.vision.image_size, self.config.vision.image_size

    @property
    def decoder_start(self) -> int:
        return self.config.qformer.vocab_size - 1  # [DEC], added behind BERT's vocabulary

    @property
    def blocks(self) -> list:
        # a layer is used by three passes a step: it is sharded and recomputed with the whole, not alone
        return []

    @property
    def vision_blocks(self) -> nn.ModuleList:
        return self.vision_model.encoder.layers

    def embed_text(self, ids: Tensor, positions: Tensor) -> Tensor:
        # (R,) -> (R, C); no token types.
        return self.embeddings.word_embeddings(ids) + self.embeddings.position_embeddings(positions)

    def embed(self, batch: Batch) -> Tensor:
        """(T, C): queries in the slots; text positions count from the segment's first text token."""
        # The places' own ids are embedded and then overwritten: no branch for them.
        x = self.embed_text(batch.input_ids, (batch.position_ids - self.num_image_tokens).clamp(min=0))
        slots = batch.image_positions
        if slots is not None and len(slots):
            x = x.index_copy(
                0, slots.flatten(), self.query_tokens.expand(len(slots), -1, -1).flatten(0, 1).to(x.dtype)
            )
        return x

    def hidden(self, batch: Batch, image: Tensor | None = None) -> Tensor:
        """The language-modelling pass: queries see queries, text sees
        queries and the text before it. (T, C)"""
        slots, cu_seqlens, device = batch.image_positions, batch.cu_seqlens, batch.input_ids.device
        query_rows, text_rows, prefix = None, torch.arange(len(batch.input_ids), device=device), 0
        if slots is not None and len(slots):
            image = batch.image_features if image is None else image
            if image is None:
                with dropout_rows(batch.image_dropout_keys, len(batch.pixel_values)):
                    image = self.vision_model(batch.pixel_values)
            # Text sees its segment's Q queries, and is causal behind them.
            query_rows, text_rows, prefix = slots.flatten(), self.text_of(batch)[0], self.num_image_tokens
            (text_rows,) = on(device, text_rows)
        prefix_lens = torch.full((len(cu_seqlens) - 1,), prefix)
        # Keys are what turns dropout on.
        keys = batch.dropout_keys if self.training else None
        image_keys = None if keys is None else batch.image_dropout_keys
        ctx = QFormerContext(
            cu_seqlens, query_rows, text_rows, image, prefix_lens, keys, image_keys, batch.cache
        )
        return self.qformer(self.embed(batch), ctx)

    def logits(self, x: Tensor) -> Tensor:
        # BERT's head, tied to the word embedding.
        return self.cls.predictions(x, self.embeddings.word_embeddings.weight)

    def encode_text(self, ids: Tensor, lengths: Tensor, keys: Tensor | None = None) -> Tensor:
        """Text alone (T,), both directions -> (T, C)."""
        # Each text begins at position 0, wherever it lies in the stream.
        rows = torch.arange(len(ids), device=ids.device)
        # No queries and no prefix: text sees itself, both ways.
        ctx = QFormerContext(segments(lengths), None, rows, None, keys=keys)
        return self.qformer(self.embed_text(ids, *on(ids.device, positions_of(lengths))), ctx)

    def match(self, image: Tensor, ids: Tensor, lengths: Tensor, keys: Tensor | None = None) -> Tensor:
        """Matching logits (S, 2) of image s (S, P, W) with text s:
        the mean over the queries, who see both."""
        # The mean of the logits, not of the queries: as in LAVIS.
        queries = self.multimodal(image, ids, lengths, keys)
        with dropout_rows(keys, len(queries)):
            return self.itm_head(queries).mean(1)

    def multimodal(self, image: Tensor, ids: Tensor, lengths: Tensor, keys: Tensor | None = None) -> Tensor:
        """Query outputs (S, Q, C) of queries and text that see each other, both directions."""
        S, Q, C = len(image), *self.query_tokens.shape[1:]
        # Pairs are no samples of the stream: a stream of their own is made, queries in front of each text.
        query_rows, text_rows, cu_seqlens = interleave(Q, lengths)
        longest, pair_keys = Q + max(lengths.tolist()), keys
        rows = query_rows, text_rows, positions_of(lengths), filled(lengths + Q, longest)
        query_rows, text_rows, positions, key_rows = on(ids.device, *rows)
        text = self.embed_text(ids, positions)
        # Filled twice by index: rows of text, rows of queries.
        x = text.new_empty(S * Q + len(ids), C).index_copy(0, text_rows, text)
        x = x.index_copy(0, query_rows, self.query_tokens.expand(S, -1, -1).flatten(0, 1).to(text.dtype))
        if keys is not None:  # (S,) -> one per row: the longest segment's worth, cut to each
            keys = spread_keys(keys, longest, salt=3)[key_rows]
        ctx = QFormerContext(cu_seqlens, query_rows, text_rows, image, keys=keys, image_keys=pair_keys)
        # (S*Q, C) -> (S, Q, C): what text rows became is of no use here.
        return self.qformer(x, ctx)[query_rows].unflatten(0, (S, Q))

    def image_features(self, queries: Tensor) -> Tensor:
        """(N, Q, C) -> (N, Q, E), unit length."""
        # Unit length, so that products are cosines.
        return F.normalize(self.vision_projection(queries), dim=-1)

    def text_features(self, text: Tensor, lengths: Tensor) -> Tensor:
        """Encoded text -> (S, E) of the first tokens, unit length."""
        (firsts,) = on(text.device, segments(lengths)[:-1])
        return F.normalize(self.text_projection(text[firsts]), dim=-1)

    def encode_and_project(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W) -> what match() takes (N, P, W), and image_features() of the queries alone."""
        # The tower is by far the dearest: its output is kept for matching.
        image = self.vision_model(pixel_values)
        return image, self.image_features(encode_queries(self, image))

    def text_of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The text rows' places in the stream, and how many each segment has; on the host."""
        lengths = batch.cu_seqlens.diff().long() - self.num_image_tokens
        return interleave(self.num_image_tokens, lengths)[1], lengths

    def loss_counts(self, batch: Batch) -> list[int]:
        """What each of LOSSES is a sum over: images, pairs, tokens."""
        # Three pairs an image: its own, with another image, with another text.
        B = len(batch.image_positions)
        return [B, 3 * B, batch.num_supervised]

    def draw(self, scores: Tensor, rows: Tensor, columns: Tensor, purpose: int) -> Tensor:
        """(B,) one column a row, drawn with probabilities softmax(scores) (B, M).

        By adding Gumbel noise that is a hash of the two samples' keys: no number of ranks or their order
        changes it.
        """
        # 64-bit keys folded to 32: what the hash works on.
        rows, columns = (mix((k ^ (k >> 32)).to(torch.int32)) for k in (rows, columns))
        bits = mix(mix(rows[:, None] + purpose) ^ columns)  # int32 (B, M)
        # Strictly between 0 and 1, so that both logarithms are finite. fp64: ties would depend on the order.
        uniform = (bits.double() + 2**31 + 0.5) / 2**32
        return (scores.double() - (-uniform.log()).log()).argmax(1)

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Summed losses (3,) as in LOSSES, and (S, 3, 2): sum and count of each segment (detached). all ranks

        The batch of all ranks is what images and texts are contrasted in. `image_ids` (S,), optional: pairs
        of the same image are positives of each other and never negatives.
        """
        weight = 1.0
        if not len(batch.image_positions):
            # this rank has no sample left, but the others wait for it: a blank one, times 0
            batch, weight = self.blank(batch), 0.0
        B, device = len(batch.image_positions), batch.input_ids.device
        rows, lengths = self.text_of(batch)
        # A blank sample takes part in every collective and is shown to nobody.
        facts = parallel.from_data_ranks([B if weight else 0, max(lengths.tolist())], device)
        counts, longest = [n for n, _ in facts], max(length for _, length in facts)
        rows, begins = on(device, rows, rows[segments(lengths)[:-1]])
        ids, keys = batch.input_ids[rows], batch.image_dropout_keys
        dropout = keys if self.training else None
        with dropout_rows(dropout, len(batch.pixel_values)):
            image = self.vision_model(batch.pixel_values)  # (B, P, W), for all three passes

        # a caption begins with [DEC] where it is generated; queries don't see it, so this pass gives them
        # what one without text would
        started = batch.input_ids.index_fill(0, begins, self.decoder_start)
        x = self.hidden(replace(batch, input_ids=started), image)  # (T, C)
        with dropout_rows(dropout, B):
            image_feats = self.image_features(x[batch.image_positions])  # (B, Q, E)
        text_keys = None if dropout is None else batch.dropout_keys[rows] + 1
        encoded = self.encode_text(ids, lengths, text_keys)
        with dropout_rows(dropout, B):
            text_feats = self.text_features(encoded, lengths)  # (B, E)

        # LAVIS's four passes over the Q-Former: image alone and text alone (above), pairs, captioning.
        sim_i2t, sim_t2i, own, same = self.similarities(batch, image_feats, text_feats, counts)
        M = same.shape[1]
        # Several texts of one image share its target; smoothing spreads a tenth over all M.
        targets = same / same.sum(1, keepdim=True) * (1 - self.SMOOTHING) + self.SMOOTHING / M
        logs = sim_i2t.float().log_softmax(-1) + sim_t2i.float().log_softmax(-1)
        itc = -(targets * logs).sum(1) / 2  # (B,)

        # the most similar of the others are the likeliest negatives
        all_keys, _ = parallel.gather_rows(keys, counts)
        with torch.no_grad():
            negative_image, negative_text = (
                self.draw(sim.masked_fill(same, self.MASKED).float().log_softmax(-1), keys, all_keys, purpose)
                for purpose, sim in ((1, sim_t2i), (2, sim_i2t))
            )
        every_image, _ = parallel.gather_rows(image, counts, differentiable=True)
        # In LAVIS's order: matching pair, foreign image, foreign text.
        images = torch.cat((image, every_image[negative_image], image))  # (3B, P, W)
        own = own.clamp(max=M - 1)  # a blank sample has no place of its own
        texts = torch.cat((own, own, negative_text))
        itm = self.matching(
            images, self.gather_text(ids, lengths, longest, counts), texts, lengths, dropout
        )  # (3, B)
        # a pair that is alone, or among pairs of its own image, has no negative: what was drawn is its
        # positive
        itm = itm[0] + itm[1:].sum(0) * (~same).any(1)  # (B,)

        # Each sample's share of the three losses, and what it counts for: (B, 3).
        lm, lm_counts = self.captioning(batch, x)
        sums = torch.stack((itc, itm, lm), dim=1)  # (B, 3)
        ones = torch.ones_like(lm_counts)
        counts = torch.stack((ones, 3 * ones, lm_counts), dim=1)
        return sums.sum(0) * weight, torch.stack((sums.detach(), counts), dim=-1) * weight

    def similarities(
        self, batch: Batch, image_feats: Tensor, text_feats: Tensor, counts: list[int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of this rank's B images with the M texts of all ranks (B, M), of its texts with all images; the
        places of its own pairs among the M (B,); which pairs show the same image (B, M) bool. all ranks

        The gathered side is detached, also in one process, as in LAVIS: each direction trains one side. An
        image's similarity is its best query's.
        """
        all_images, first = parallel.gather_rows(image_feats.detach(), counts)  # (M, Q, E)
        all_texts, _ = parallel.gather_rows(text_feats.detach(), counts)  # (M, E)
        sim_i2t = torch.einsum("bqe,me->bmq", image_feats, all_texts).amax(-1) / self.temp
        sim_t2i = torch.einsum("be,mqe->bmq", text_feats, all_images).amax(-1) / self.temp
        own, M = torch.arange(first, first + len(text_feats), device=text_feats.device), len(all_texts)
        if (image_ids := batch.image_ids) is None:
            same = own.clamp(max=M - 1)[:, None] == torch.arange(M, device=own.device)
        else:
            same = image_ids[:, None] == parallel.gather_rows(image_ids, counts)[0]
        return sim_i2t, sim_t2i, own, same

    def matching(
        self, images: Tensor, every: tuple[Tensor, Tensor], texts: Tensor, own: Tensor, dropout: Tensor | None
    ) -> Tensor:
        """(3, B) losses of true pairs, of negative images, of negative texts: `images` (3B, P, W) beside the
        `texts` (3B,) of `every` (ids (M, L), lengths (M,))."""
        ids, lengths = every[0][texts], every[1][texts]
        # The one wait of a micro-batch: how long the stream is, only what was drawn says. A dry run draws
        # nothing: as long as its own texts.
        lengths = own.repeat(3) if lengths.is_meta else lengths.cpu()
        (places,) = on(ids.device, filled(lengths, ids.shape[1]))
        ids = ids.flatten()[places]  # without pads, a stream
        keys = None if dropout is None else torch.cat((dropout, dropout + 1, dropout + 2))
        matched = self.match(images, ids, lengths, keys)  # (3B, 2)
        B = len(texts) // 3
        labels = torch.ones(3 * B, dtype=torch.long, device=ids.device)
        labels[B:] = 0
        return F.cross_entropy(matched.float(), labels, reduction="none").view(3, B)

    def captioning(self, batch: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
        """Language-modelling losses of each segment, summed, and their number: (B,) and (B,). `x` (T, C)."""
        predicted = batch.supervised
        with dropout_rows(batch.dropout_keys[predicted] if self.training else None):
            predictions = self.logits(x[predicted]).float()
        losses = F.cross_entropy(
            predictions, batch.targets[predicted], reduction="none", label_smoothing=self.SMOOTHING
        )
        segment = torch.bucketize(predicted, batch.cu_seqlens[1:].to(x.device), right=True)
        sums, counts = torch.zeros(2, len(batch.image_positions), device=x.device)
        return sums.index_add(0, segment, losses), counts.index_add(0, segment, torch.ones_like(losses))

    def blank(self, batch: Batch) -> Batch:
        """A batch of one sample without meaning."""
        Q, device = self.num_image_tokens, batch.input_ids.device
        ids = torch.zeros(Q + 2, dtype=torch.long, device=device)
        zero = torch.zeros(1, dtype=torch.long, device=device)
        return replace(
            batch,
            input_ids=ids,
            targets=torch.cat((ids[:-1] + IGNORE_INDEX, zero)),
            supervised=zero + Q + 1,
            position_ids=torch.arange(Q + 2, device=device),
            cu_seqlens=torch.tensor([0, Q + 2], dtype=torch.int32),
            image_positions=torch.arange(Q, device=device)[None],
            dropout_keys=ids,
            image_dropout_keys=zero,
        )

    @staticmethod
    def gather_text(ids: Tensor, lengths: Tensor, longest: int, counts: list[int]) -> tuple[Tensor, Tensor]:
        """The texts of all ranks as (M, L) with pads, and their lengths (M,). all ranks"""
        places, lengths = on(ids.device, filled(lengths, longest), lengths)
        padded = ids.new_zeros(len(lengths) * longest).index_copy(0, places, ids).view(-1, longest)
        return parallel.gather_rows(padded, counts)[0], parallel.gather_rows(lengths, counts)[0]

    def forward(self, batch: Batch, output: str = "loss", x: None = None, blocks: None = None):
        """`output`: "loss" as losses(); "logits" (S, V) of each segment's last position (captioning with
        stage 1 alone); "itc" (S, S) similarities of every image with every text; "itm" (S,) probability
        that image and text match. `x`, `blocks`: a pipeline's, for which this model has no stages."""
        assert x is None and not blocks, "stage 1 has no pipeline stages"
        if output == "features":
            return self.encode_images(batch.pixel_values)
        if output == "logits":
            x = self.hidden(batch)
            return self.logits(x if batch.single else x[batch.cu_seqlens[1:].to(x.device) - 1])
        if output == "loss":
            return self.losses(batch)
        rows, lengths = self.text_of(batch)
        (rows,) = on(batch.input_ids.device, rows)
        ids = batch.input_ids[rows]
        image, image_feats = self.encode_and_project(batch.pixel_values)
        if output == "itm":
            return self.match(image, ids, lengths).softmax(-1)[:, 1]
        text_feats = self.text_features(self.encode_text(ids, lengths), lengths)
        return torch.einsum("bqe,me->bmq", image_feats, text_feats).amax(-1)

    def encode_images(self, pixel_values: Tensor, keys: Tensor | None = None) -> Tensor:
        """The tower's output (N, P, W): the queries look at it in every pass anew."""
        return self.vision_model(pixel_values)

    def head(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.losses(batch)  # of three passes of its own, not of one hidden state

    def cache_group(self, length: int) -> int:
        return 0

    def init_weights(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        init_weights(self.config, name, tensor, generator)
