//! How long the exchange of a training step between the GPUs of a run takes, by its bytes and the links between them,
//! and whether several GPUs then do more than one.
//!
//! What is exchanged is what `train` exchanges: all-to-all of the gradient, a sum on each GPU, all-gather of the sums
//! of squares for the norm, all-gather of the weights. A call takes what NCCL's own model says of a ring:
//! `call + hops + bytes / bandwidth`. `docs/several-gpus.md` has the formula and the sources of the numbers.
//!
//! Deliberately absent: what starts before the backward pass has ended, which the program does not do; links that
//! others use at the same time; stragglers; what the log asks of the ranks every few hundred steps.

use serde::Serialize;

use super::bound::shared_update;
use super::card::{CARDS, Card, GAP};
use crate::device::Device;
use crate::error::Result;
use crate::ops::grad_norm;
use crate::params::Specs;
use crate::usage;

/// What connects GPUs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// Its name in the JSON.
    pub key: &'static str,
    /// Its name.
    pub name: &'static str,
    /// Bytes a second that a GPU, or a machine, sends while it receives as many: measured, not the data sheet's.
    pub bandwidth: f64,
    /// Seconds of a hop of NCCL's ring, protocol Simple.
    pub hop: f64,
}

/// Seconds of a call before its first hop, by NCCL's model (`src/graph/tuning.cc`: `baseLat`, ring, Simple).
pub const CALL: f64 = 8.4e-6;

/// NVLink of one machine.
const NVLINK: Link = Link { key: "nvlink_h100", name: "NVLink, H100", bandwidth: 370e9, hop: 3.4e-6 };

/// A network card.
const NETWORK: Link = Link { key: "network_100", name: "100 Gb/s network", bandwidth: 11.5e9, hop: 14e-6 };

/// The links, the fastest first. Bandwidths are bus bandwidths of NCCL's tests: 8 H100 by a ring (nccl-tests 212),
/// 8 A100 (nccl-tests 149), 8 RTX 5090 by PCIe 5.0 (nccl 1639), GPUs without NVLink by PCIe 4.0 (nccl-tests 178); of
/// the network a quarter of the 46 GB/s that a card of 400 Gb/s has (nccl-tests 290). Hops: `hwLat` of NCCL's model.
pub const LINKS: [Link; 5] = [
    NVLINK,
    Link { key: "nvlink_a100", name: "NVLink, A100", bandwidth: 200e9, hop: 3.4e-6 },
    Link { key: "pcie5", name: "PCIe 5.0 x16", bandwidth: 28e9, hop: 5.7e-6 },
    Link { key: "pcie4", name: "PCIe 4.0 x16", bandwidth: 20e9, hop: 5.7e-6 },
    NETWORK,
];

/// GPUs of a step, at most.
pub const MOST_GPUS: usize = 1024;

/// GPUs of a machine, at most.
const OF_A_MACHINE: usize = 8;

/// How the GPUs of a run are connected, and which way the bytes take.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Way {
    /// Each GPU by a link of its own.
    Alike(Link),
    /// Machines of `gpus` GPUs with H100's NVLink inside and one network card each.
    Machines {
        /// GPUs of a machine.
        gpus: usize,
        /// Gradients are added up inside a machine first, and each GPU exchanges its shard of the machine's sum with
        /// those at its place in the others. Otherwise every GPU sends to every other.
        two_levels: bool,
    },
}

impl Way {
    /// Those that are compared for `ranks` GPUs: each link, and the fewest machines of a power of two of GPUs, at most
    /// 8, whose sums are nodes of the tree (`ops::tree_sum`).
    pub fn all(ranks: usize) -> Vec<Way> {
        let mut ways: Vec<Way> = LINKS.map(Way::Alike).to_vec();
        let is_a_machine = |gpus: usize| gpus.is_power_of_two() && gpus <= OF_A_MACHINE;
        let fits = |&machines: &usize| ranks.is_multiple_of(machines) && is_a_machine(ranks / machines);
        if let Some(machines) = (2..=ranks / 2).find(fits) {
            ways.extend([false, true].map(|two_levels| Way::Machines { gpus: ranks / machines, two_levels }));
        }
        ways
    }

    /// In the JSON.
    pub fn key(&self) -> &'static str {
        match self {
            Way::Alike(link) => link.key,
            Way::Machines { two_levels: false, .. } => "machines_flat",
            Way::Machines { two_levels: true, .. } => "machines_two_levels",
        }
    }

    /// For `ranks` GPUs, in words.
    pub fn name(&self, ranks: usize) -> String {
        match self {
            Way::Alike(link) => link.name.into(),
            Way::Machines { gpus, two_levels } => {
                let how = if *two_levels { "in two levels" } else { "all to all" };
                format!("{} machines of {gpus}, {how}", ranks / gpus)
            }
        }
    }

    /// The link that limits it.
    pub fn slowest(&self) -> &Link {
        match self {
            Way::Alike(link) => link,
            Way::Machines { .. } => &NETWORK,
        }
    }

    /// Seconds that `bytes` take between `ranks` GPUs, whose sums are limited by the memory of `card`.
    pub fn seconds(&self, bytes: &Bytes, ranks: usize, card: &Card) -> f64 {
        let (gradient, squares) = (bytes.gradient as f64, bytes.squares as f64);
        // What each of `n` sends of `bytes` that all of them have, or get, a part of.
        let foreign = |bytes: f64, n: usize| bytes * (n - 1) as f64 / n as f64;
        let call = |link: &Link, n: usize, sent: f64| CALL + (n - 1) as f64 * link.hop + sent / link.bandwidth;
        // Reads one part for each of `n`, writes one.
        let sum = |bytes: f64, n: usize| GAP + bytes * (n + 1) as f64 / n as f64 / card.memory;
        match *self {
            Way::Alike(link) => {
                2.0 * call(&link, ranks, foreign(gradient, ranks))
                    + call(&link, ranks, foreign(squares, ranks))
                    + sum(gradient, ranks)
            }
            Way::Machines { gpus, two_levels } => {
                let machines = ranks / gpus;
                // A ring through all GPUs leaves each machine once.
                let ring = |bytes: f64| {
                    let inside = (ranks - machines) as f64 * NVLINK.hop;
                    CALL + inside + (machines - 1) as f64 * NETWORK.hop + foreign(bytes, ranks) / NETWORK.bandwidth
                };
                if !two_levels {
                    // Each of its GPUs sends a shard to each GPU of the other machines.
                    let out = gpus as f64 * foreign(gradient, machines);
                    let all_to_all = ring(0.0) + out / NETWORK.bandwidth;
                    return all_to_all + ring(squares) + ring(gradient) + sum(gradient, ranks);
                }
                let shard = gradient / gpus as f64;
                // The shards of a machine's GPUs, which share its card, are together the gradient.
                let within = call(&NVLINK, gpus, foreign(gradient, gpus));
                let between = call(&NETWORK, machines, foreign(gradient, machines));
                2.0 * (within + between) + ring(squares) + sum(gradient, gpus) + sum(shard, machines)
            }
        }
    }
}

/// What the ranks of a step exchange, all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Bytes {
    /// The gradient, and as much again for the weights: f32, padded to equal shards of whole chunks of the norm.
    pub gradient: u64,
    /// The sums of squares for the norm: an f64 for each chunk.
    pub squares: u64,
}

impl Bytes {
    /// For `elements` of the flat buffer of parameters, without padding, in shards for `ranks`.
    pub fn of(elements: usize, ranks: usize) -> Self {
        let elements = elements.next_multiple_of(ranks * grad_norm::CHUNK);
        let squares = grad_norm::squares_shape(&Device::meta_gpu(), ranks, elements / ranks);
        Bytes { gradient: 4 * elements as u64, squares: 4 * squares.len() as u64 }
    }

    /// What each of `ranks` sends, and receives, in a step in which every GPU sends to every other.
    pub fn sent(&self, ranks: usize) -> u64 {
        (2 * self.gradient + self.squares) / ranks as u64 * (ranks as u64 - 1)
    }
}

/// A way of the exchange beside the step that it is part of.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// [`Way::key`].
    pub link: &'static str,
    /// [`Way::name`].
    pub name: String,
    /// Bytes a second of the slowest link.
    pub bandwidth: f64,
    /// Milliseconds of the exchange.
    pub exchange_ms: f64,
    /// Its share of the step, from 0 to 1: the most that could be gained by hiding all of it.
    pub share: f64,
    /// Throughput, as a multiple of one GPU's.
    pub speed_up: f64,
    /// The same for each GPU: 1 is a multiple as large as the number of GPUs.
    pub efficiency: f64,
    /// The fewest GPUs with a throughput above one GPU's; `None` if no number up to [`MOST_GPUS`] has.
    pub pays_from: Option<usize>,
}

/// Steps of which an exchange is part.
pub struct Steps<'a> {
    /// Elements of the flat buffer of parameters.
    pub elements: usize,
    /// Whose memory the sums are limited by.
    pub card: &'a Card,
    /// Numbers of GPUs that a step can have.
    pub counts: &'a dyn Fn(usize) -> bool,
    /// Seconds of a step of one of so many GPUs without the exchange.
    pub of_rank: &'a dyn Fn(usize) -> f64,
    /// Seconds that one GPU alone takes for the images of a step of so many GPUs.
    pub alone: &'a dyn Fn(usize) -> f64,
}

impl Steps<'_> {
    /// The exchange between `ranks` GPUs, one row for each way.
    pub fn rows(&self, ranks: usize) -> Vec<Row> {
        Way::all(ranks).into_iter().map(|way| self.row(way, ranks)).collect()
    }

    fn row(&self, way: Way, ranks: usize) -> Row {
        let exchange = |ranks| way.seconds(&Bytes::of(self.elements, ranks), ranks, self.card);
        let speed_up = |ranks| (self.alone)(ranks) / ((self.of_rank)(ranks) + exchange(ranks));
        // Machines are of the same size whatever their number, and more than one.
        let least = match way {
            Way::Alike(_) => 1,
            Way::Machines { gpus, .. } => gpus,
        };
        let mut counts = (2 * least..=MOST_GPUS).step_by(least).filter(|&ranks| (self.counts)(ranks));
        let seconds = exchange(ranks);
        Row {
            link: way.key(),
            name: way.name(ranks),
            bandwidth: way.slowest().bandwidth,
            exchange_ms: 1e3 * seconds,
            share: seconds / ((self.of_rank)(ranks) + seconds),
            speed_up: speed_up(ranks),
            efficiency: speed_up(ranks) / ranks as f64,
            pays_from: counts.find(|&ranks| speed_up(ranks) > 1.0),
        }
    }
}

/// What a training step exchanges if each of several GPUs takes it, with as many images each.
#[derive(Clone, Debug, Serialize)]
pub struct Exchanged {
    /// Number of GPUs.
    pub devices: usize,
    /// Milliseconds of the step on one GPU alone: measured or, without a GPU, modelled for an H100.
    pub step_ms: f64,
    /// Milliseconds of the step on one of several, which update a shard each.
    pub rank_step_ms: f64,
    /// What all exchange.
    pub bytes: Bytes,
    /// What each sends where every GPU sends to every other.
    pub bytes_sent: u64,
    /// By link.
    pub links: Vec<Row>,
}

impl Exchanged {
    /// Between `devices` GPUs with parameters as `specs` say, each of which takes a step that takes `step_ms` on one
    /// alone, with the memory of `card`.
    pub fn new(devices: usize, specs: &Specs, step_ms: f64, card: &Card) -> Self {
        let shared = shared_update(specs.count()) as f64 / card.memory;
        let step = step_ms / 1e3;
        let of_rank = |ranks: usize| (step - shared * (1.0 - 1.0 / ranks as f64)).max(0.0);
        let alone = |ranks: usize| ranks as f64 * step;
        let steps = Steps { elements: specs.flat_len(), card, counts: &|_| true, of_rank: &of_rank, alone: &alone };
        let bytes = Bytes::of(specs.flat_len(), devices);
        Exchanged {
            devices,
            step_ms,
            rank_step_ms: 1e3 * of_rank(devices),
            bytes,
            bytes_sent: bytes.sent(devices),
            links: steps.rows(devices),
        }
    }
}

/// The H100, at whose time of a step links are compared: the shorter a step, the more an exchange weighs.
pub fn h100() -> &'static Card {
    CARDS.iter().find(|card| card.key == "h100").expect("it is one of them")
}

/// Refuses a number of GPUs between which nothing is exchanged, or too many.
///
/// # Errors
/// `Error::Usage`.
pub fn check(devices: usize) -> Result<()> {
    if !(2..=MOST_GPUS).contains(&devices) {
        usage!("--devices {devices}: an exchange is between a number of GPUs from 2 to {MOST_GPUS}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::{Init, Layout, Specs};
    use crate::shape::Shape;

    /// A link of 1 GB/s with hops of 1 ms.
    const SLOW: Link = Link { key: "slow", name: "slow", bandwidth: 1e9, hop: 1e-3 };

    fn close(got: f64, want: f64) {
        assert!((got / want - 1.0).abs() < 1e-12, "{got}, by hand {want}");
    }

    /// What is exchanged is as long as the buffers of the trainer, which are padded.
    #[test]
    fn buffers_are_padded_as_the_trainer_pads_them() {
        let mut specs = Specs::default();
        specs.add("w".into(), Shape::vector(100_001), Layout::Vector, Init::Zeros);
        let elements = specs.flat_len();
        for ranks in [2, 3, 8] {
            specs.pad(ranks * grad_norm::CHUNK);
            assert_eq!(Bytes::of(elements, ranks).gradient, 4 * specs.flat_len() as u64);
        }
        // 131,072 elements: two shards of 65,536, with four sums of 16,384 squares each.
        assert_eq!(Bytes::of(elements, 2), Bytes { gradient: 524_288, squares: 64 });
        assert_eq!(Bytes::of(elements, 2).sent(2), 524_288 + 32);
        assert_eq!(Bytes::of(elements, 8), Bytes { gradient: 2_097_152, squares: 256 });
        assert_eq!(Bytes::of(elements, 8).sent(8), 2 * 2_097_152 / 8 * 7 + 224);
    }

    /// 4 GB between 4 GPUs over 1 GB/s: three calls of 8.4 us and three hops of 1 ms, twice 3 GB and 12 bytes, and the
    /// sum of four parts of 1 GB, which reads 4 and writes 1 at 3 TB/s.
    #[test]
    fn a_link_takes_what_it_should() {
        let bytes = Bytes { gradient: 4_000_000_000, squares: 16 };
        let sum = 1.5e-6 + 5e9 / 3e12;
        let want = 3.0 * (8.4e-6 + 3e-3) + 6.0 + 12e-9 + sum;
        close(Way::Alike(SLOW).seconds(&bytes, 4, h100()), want);
        assert_eq!(LINKS.map(|link| link.bandwidth / 1e9), [370.0, 200.0, 28.0, 20.0, 11.5]);
    }

    /// 1.6 GB between two machines of 8 with cards of 11.5 GB/s. In two levels: 1.4 GB inside and 0.8 GB out of each
    /// machine, twice. All to all: 8 GPUs send 0.1 GB to each of 8 others, 6.4 GB, and a ring takes 1.5 GB.
    #[test]
    fn machines_take_what_they_should() {
        let bytes = Bytes { gradient: 1_600_000_000, squares: 1600 };
        let ring = |bytes: f64| 8.4e-6 + 14.0 * 3.4e-6 + 14e-6 + bytes / 11.5e9;
        let within = 8.4e-6 + 7.0 * 3.4e-6 + 1.4e9 / 370e9;
        let between = 8.4e-6 + 14e-6 + 0.8e9 / 11.5e9;
        let sums = 1.5e-6 + 1.8e9 / 3e12 + 1.5e-6 + 0.3e9 / 3e12;
        let two_levels = Way::Machines { gpus: 8, two_levels: true };
        close(two_levels.seconds(&bytes, 16, h100()), 2.0 * (within + between) + ring(1500.0) + sums);
        let flat = Way::Machines { gpus: 8, two_levels: false };
        let want = ring(6.4e9) + ring(1500.0) + ring(1.5e9) + 1.5e-6 + 1.7e9 / 3e12;
        close(flat.seconds(&bytes, 16, h100()), want);
    }

    #[test]
    fn machines_are_as_few_as_can_be() {
        let machines = |ranks| match Way::all(ranks).last() {
            Some(Way::Machines { gpus, two_levels: true }) => Some((ranks / gpus, *gpus)),
            _ => None,
        };
        assert_eq!([2, 3, 5, 7].map(machines), [None; 4]);
        let want = [(2, 2), (3, 2), (2, 4), (3, 4), (2, 8), (3, 8), (125, 8)].map(Some);
        assert_eq!([4, 6, 8, 12, 16, 24, 1000].map(machines), want);
        assert_eq!(Way::all(16)[6].name(16), "2 machines of 8, in two levels");
    }

    /// With as many images on each GPU, W of them pay once W T > T + E.
    #[test]
    fn it_pays_where_several_do_more_than_one() {
        let link = Link { hop: 0.0, ..SLOW };
        let of = |step: f64, elements: usize, counts: &dyn Fn(usize) -> bool| {
            let steps =
                Steps { elements, card: h100(), counts, of_rank: &|_| step, alone: &|ranks| ranks as f64 * step };
            steps.row(Way::Alike(link), 2)
        };
        // Padded, 8.39, 8.65 and 8.39 MB for 2, 3 and 4 GPUs, of which 2 (W - 1) / W: 8.4, 11.5 and 12.6 ms. With a
        // step of 8 ms 8 (W - 1) ms are more from 3 on.
        let two = of(8e-3, 2_000_000, &|_| true);
        assert_eq!(two.pays_from, Some(3));
        assert!((0.97..0.98).contains(&two.speed_up), "{two:?}");
        close(two.efficiency, two.speed_up / 2.0);
        close(two.share, 1.0 - two.speed_up / 2.0);
        assert_eq!(of(8e-3, 2_000_000, &|ranks| ranks.is_power_of_two()).pays_from, Some(4));
        assert_eq!(of(9e-3, 2_000_000, &|_| true).pays_from, Some(2));
        // A shard is 256 KiB at least: 0.55 ms for 2 GPUs, 1.07 for 3, and 0.52 more for each. 0.1 ms never pay.
        assert_eq!(of(1e-4, 1, &|_| true).pays_from, None);
    }

    #[test]
    fn numbers_without_an_exchange_are_refused() {
        for devices in [0, 1, 1025, usize::MAX] {
            let why = check(devices).unwrap_err().to_string();
            assert_eq!(why, format!("--devices {devices}: an exchange is between a number of GPUs from 2 to 1024"));
        }
        assert!([2, 1024].into_iter().all(|devices| check(devices).is_ok()));
    }
}
