//! What ranks give each other, as threads of one process; and what they are told if one ends or does something else.

mod support;

use ddpm_cuda::device::Device;
use ddpm_cuda::exchange::Exchange;
use ddpm_cuda::tensor::{DType, Shape, Tensor};

use support::{each_rank, each_rank_of_machines, gpu};

/// What element i of rank r's buffer is at first.
fn number(rank: usize, i: usize) -> f32 {
    (1000 * rank + i) as f32
}

fn buffer(device: &Device, rank: usize, len: usize) -> Tensor {
    let numbers: Vec<f32> = (0..len).map(|i| number(rank, i)).collect();
    Tensor::from_slice(device, Shape::vector(len), &numbers).unwrap()
}

/// Two rounds of each call, so that what was given last is not taken for what is given now.
fn gets_what_the_others_gave(open: impl Fn() -> Device + Sync) {
    const SHARD: usize = 5;
    for (machines, ranks) in [(1, 2), (1, 3), (1, 4), (2, 4), (3, 6), (2, 8), (2, 6)] {
        each_rank_of_machines(machines, ranks, |exchange| {
            let (device, rank, len) = (open(), exchange.rank(), ranks * SHARD);
            assert_eq!((exchange.size(), exchange.is_first()), (ranks, rank == 0));
            for round in [0, 100] {
                let mut place = 0;
                let mut own = buffer(&device, rank + round, len);
                // Of each level the parts of the others; what is left after the last is the shard of all.
                for level in exchange.levels() {
                    let part = own.shape().len() / level.len();
                    let mut to = Tensor::zeros(&device, own.shape()).unwrap();
                    exchange.all_to_all(&own, &mut to, &level).unwrap();
                    let at = place + level.iter().position(|&other| other == rank).unwrap() * part;
                    let to = to.to_vec().unwrap();
                    for (k, &other) in level.iter().enumerate() {
                        for i in 0..part {
                            assert_eq!(to[k * part + i], number(other + round, at + i), "{ranks} ranks, {i} at {rank}");
                        }
                    }
                    let own_part = to[level.iter().position(|&other| other == rank).unwrap() * part..][..part].to_vec();
                    own = Tensor::from_slice(&device, Shape::vector(part), &own_part).unwrap();
                    place = at;
                }
                assert_eq!((own.shape().len(), place), (SHARD, exchange.shard() * SHARD), "{ranks} ranks, rank {rank}");
                let owners = exchange.gather(&[exchange.shard() as u64]).unwrap().concat();
                let mut whole = buffer(&device, rank + round, len);
                exchange.all_gather(&mut whole).unwrap();
                for (i, gathered) in whole.to_vec().unwrap().into_iter().enumerate() {
                    let from = owners.iter().position(|&shard| shard as usize == i / SHARD).unwrap();
                    assert_eq!(gathered, number(from + round, i), "{ranks} ranks, gathered {i} at {rank}");
                }
                // A rank gives as many numbers as its own.
                let rows = exchange.gather(&vec![(rank + round) as u64; rank]).unwrap();
                assert_eq!(rows, (0..ranks).map(|rank| vec![(rank + round) as u64; rank]).collect::<Vec<_>>());
                assert!(exchange.any(rank == round % ranks).unwrap() && !exchange.any(false).unwrap());
                let texts = exchange.texts(&format!("rank {rank}")).unwrap();
                assert_eq!(texts, (0..ranks).map(|rank| format!("rank {rank}")).collect::<Vec<_>>());
            }
        });
    }
}

#[test]
fn every_rank_gets_what_the_others_gave() {
    gets_what_the_others_gave(Device::cpu_guarded);
}

#[test]
fn gpus_get_what_the_others_gave() {
    if gpu::available() {
        gets_what_the_others_gave(|| Device::Cuda(gpu::gpu(DType::F32).expect("kernels can be tested")));
    }
}

#[test]
fn a_run_of_one_rank_has_all_there_is() {
    let alone = Exchange::alone();
    assert_eq!((alone.rank(), alone.size(), alone.is_first(), alone.passes_the_host()), (0, 1, true, None));
    assert_eq!(alone.gather(&[1u32, 2]).unwrap(), [[1, 2]]);
    assert_eq!((alone.any(true).unwrap(), alone.any(false).unwrap()), (true, false));
    assert_eq!(alone.texts("here").unwrap(), ["here"]);
    let mut x = buffer(&Device::cpu(), 3, 7);
    alone.all_gather(&mut x).unwrap();
    assert_eq!(x.data()[6], number(3, 6));
}

/// The others' calls fail, those that wait and those that come later, and nobody hangs. What all have given before is
/// still taken.
#[test]
fn the_others_are_told_of_a_rank_that_has_ended() {
    let said = each_rank(3, |exchange| {
        let rank = exchange.rank();
        assert_eq!(exchange.gather(&[rank as u8]).unwrap(), [[0], [1], [2]]);
        if rank == 1 {
            return Vec::new();
        }
        (0..2).map(|_| exchange.gather(&[0u8]).unwrap_err().to_string()).collect()
    });
    for (rank, said) in [0, 2].into_iter().zip([&said[0], &said[2]]) {
        let want = format!("rank 1 has ended, without which rank {rank} cannot go on");
        assert_eq!(said, &[want.clone(), want]);
    }
}

#[test]
fn a_rank_that_panics_has_ended() {
    let mut ranks = Exchange::threads(2).into_iter();
    let [first, second] = [ranks.next().unwrap(), ranks.next().unwrap()];
    let dies = std::thread::spawn(move || {
        let _exchange = second;
        panic!("on purpose");
    });
    let said = first.any(false).unwrap_err().to_string();
    assert_eq!(said, "rank 1 has ended, without which rank 0 cannot go on");
    assert!(dies.join().is_err());
}

#[test]
fn ranks_that_make_other_calls_are_told_so() {
    let said = each_rank(2, |exchange| {
        let device = Device::cpu();
        let mut x = buffer(&device, 0, 4);
        let mut y = buffer(&device, 0, 6);
        match exchange.rank() {
            0 => [exchange.any(true).map(|_| ()), exchange.all_gather(&mut x)],
            _ => [exchange.all_gather(&mut x), exchange.all_gather(&mut y)],
        }
        .map(|said| said.unwrap_err().to_string())
    });
    let want = [
        "gather and rank 1 calls all_gather of shards of 2 elements",
        "all_gather of shards of 2 elements and rank 1 calls all_gather of shards of 3 elements",
    ]
    .map(|calls| format!("the ranks of a run make the same calls, but rank 0 calls {calls}"));
    assert!(said.iter().all(|said| said == &want), "{said:?}");
}
