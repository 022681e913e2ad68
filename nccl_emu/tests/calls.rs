//! What the functions do: every collective call in and out of place, sends and receives, groups, graphs, communicators
//! that do not block. The ranks are threads.

#![allow(
    clippy::undocumented_unsafe_blocks,
    reason = "each passes a call the arguments that it declares, of memory that is there"
)]

mod support;

use std::ffi::{CStr, c_int};
use std::sync::Barrier;

use cudarc::driver::CudaContext;
use cudarc::driver::sys;
use support::*;

#[test]
fn versions_and_texts() {
    let nccl = nccl();
    let text = |text| unsafe { CStr::from_ptr(text) }.to_str().unwrap();
    assert_eq!(text(unsafe { (nccl.emulator_version)() }), env!("CARGO_PKG_VERSION"));
    let mut version = 0;
    assert_eq!((unsafe { (nccl.version)(&mut version) }, version), (SUCCESS, 23003));
    for (code, expected) in [
        (0, "no error"),
        (1, "unhandled cuda error"),
        (2, "unhandled system error"),
        (3, "internal error"),
        (4, "invalid argument"),
        (5, "invalid usage"),
        (6, "remote process exited or there was a network error"),
        (7, "NCCL operation in progress"),
        (8, "timeout"),
        (99, "unknown result code"),
        (-1, "unknown result code"),
    ] {
        assert!(text(unsafe { (nccl.error_string)(code) }).starts_with(expected), "{code}");
    }
    let (one, other) = (unique_id(), unique_id());
    assert_ne!(one.0, other.0);
}

/// The symbol's name is NCCL's: a program that opens it by name finds it once it is open.
#[test]
fn it_is_found_under_its_name() {
    nccl();
    let found = unsafe { libloading::Library::new("libnccl.so.2") }.expect("the SONAME is libnccl.so.2");
    let version = unsafe { found.get::<unsafe extern "C" fn() -> *const std::ffi::c_char>(b"nccl_emu_version\0") };
    let version = unsafe { CStr::from_ptr(version.expect("it is this library")()) };
    assert_eq!(version.to_str(), Ok(env!("CARGO_PKG_VERSION")));
}

#[test]
fn a_communicator_says_what_it_is() {
    together(3, |rank| {
        let nccl = nccl();
        let (mut count, mut device, mut number) = (0, 0, 0);
        assert_eq!(unsafe { (nccl.count)(rank.comm, &mut count) }, SUCCESS);
        assert_eq!(unsafe { (nccl.cu_device)(rank.comm, &mut device) }, SUCCESS);
        assert_eq!(unsafe { (nccl.user_rank)(rank.comm, &mut number) }, SUCCESS);
        assert_eq!((count, device, number), (3, rank.rank as c_int, rank.rank as c_int));
        assert_eq!(rank.status(), SUCCESS);
    });
}

/// Every collective call, with outputs apart from the inputs and in place, for several numbers of ranks and elements.
#[test]
fn collective_calls() {
    for size in [1, 2, 4] {
        together(size, |rank| {
            for count in [1, 7, 1000] {
                let mine = numbers(rank.rank, count);
                let all: Vec<f32> = (0..size).flat_map(|rank| numbers(rank, count)).collect();
                let sums: Vec<f32> = (0..count).map(|i| (0..size).map(|rank| numbers(rank, count)[i]).sum()).collect();
                let root = size - 1;

                let (from, to) = (rank.upload(&mine), rank.upload(&vec![0.0f32; size * count]));
                assert_eq!(rank.all_gather(rank.at(&from), rank.at(&to), count), SUCCESS, "{}", last_error());
                assert_eq!(rank.read(&to), all);
                let mut place = vec![-1.0; size * count];
                place[rank.rank * count..][..count].copy_from_slice(&mine);
                let place = rank.upload(&place);
                let own = rank.at(&place) + (4 * rank.rank * count) as u64;
                assert_eq!(rank.all_gather(own, rank.at(&place), count), SUCCESS, "{}", last_error());
                assert_eq!(rank.read(&place), all);

                let to = rank.upload(&vec![-1.0f32; count]);
                assert_eq!(rank.broadcast(rank.at(&from), rank.at(&to), count, root), SUCCESS, "{}", last_error());
                assert_eq!(rank.read(&to), numbers(root, count));
                let place = rank.upload(&mine);
                assert_eq!(rank.broadcast(rank.at(&place), rank.at(&place), count, root), SUCCESS, "{}", last_error());
                assert_eq!(rank.read(&place), numbers(root, count));
                // What is not the root's is not looked at.
                let to = rank.upload(&vec![-1.0f32; count]);
                let from_root = if rank.rank == root { rank.at(&from) } else { 0 };
                assert_eq!(rank.broadcast(from_root, rank.at(&to), count, root), SUCCESS, "{}", last_error());
                assert_eq!(rank.read(&to), numbers(root, count));

                let to = rank.upload(&vec![-1.0f32; count]);
                assert_eq!(rank.all_reduce(rank.at(&from), rank.at(&to), count, F32, SUM), SUCCESS, "{}", last_error());
                assert_eq!(rank.read(&to), sums);
                let place = rank.upload(&mine);
                assert_eq!(rank.all_reduce(rank.at(&place), rank.at(&place), count, F32, MAX), SUCCESS);
                assert_eq!(rank.read(&place), numbers(root, count));

                let to = rank.upload(&vec![-1.0f32; count]);
                assert_eq!(rank.reduce(rank.at(&from), rank.at(&to), count, root), SUCCESS, "{}", last_error());
                assert_eq!(rank.read(&to), if rank.rank == root { sums.clone() } else { vec![-1.0; count] });
                let place = rank.upload(&mine);
                assert_eq!(rank.reduce(rank.at(&place), rank.at(&place), count, root), SUCCESS, "{}", last_error());
                assert_eq!(rank.read(&place), if rank.rank == root { sums.clone() } else { mine.clone() });

                // The whole is the same on every rank, so that its sum is as many times it.
                let whole: Vec<f32> = (0..size * count).map(|i| i as f32).collect();
                let part: Vec<f32> = whole[rank.rank * count..][..count].iter().map(|x| size as f32 * x).collect();
                let (from, to) = (rank.upload(&whole), rank.upload(&vec![-1.0f32; count]));
                assert_eq!(rank.reduce_scatter(rank.at(&from), rank.at(&to), count), SUCCESS, "{}", last_error());
                assert_eq!(rank.read(&to), part);
                let own = rank.at(&from) + (4 * rank.rank * count) as u64;
                assert_eq!(rank.reduce_scatter(rank.at(&from), own, count), SUCCESS, "{}", last_error());
                assert_eq!(rank.read(&from)[rank.rank * count..][..count], part);
            }
        });
    }
}

/// Bytes of small whole numbers in every type.
fn encoded(dtype: c_int, numbers: &[i8]) -> Vec<u8> {
    let each = |&x: &i8| match dtype {
        0 | 1 => vec![x as u8],
        2 | 3 => i32::from(x).to_le_bytes().to_vec(),
        4 | 5 => i64::from(x).to_le_bytes().to_vec(),
        6 => half::f16::from_f32(x.into()).to_le_bytes().to_vec(),
        7 => f32::from(x).to_le_bytes().to_vec(),
        8 => f64::from(x).to_le_bytes().to_vec(),
        9 => half::bf16::from_f32(x.into()).to_le_bytes().to_vec(),
        _ => unreachable!(),
    };
    numbers.iter().flat_map(each).collect()
}

#[test]
fn every_type_and_operator() {
    together(2, |rank| {
        let inputs: [[i8; 3]; 2] = [[1, 6, 10], [3, 2, 4]];
        for dtype in 0..=9 {
            for (op, expected) in [[4, 8, 14], [3, 12, 40], [3, 6, 10], [1, 2, 4], [2, 4, 7]].into_iter().enumerate() {
                let place = rank.upload(&encoded(dtype, &inputs[rank.rank]));
                let code = rank.all_reduce(rank.at(&place), rank.at(&place), 3, dtype, op as c_int);
                assert_eq!(code, SUCCESS, "{}", last_error());
                assert_eq!(rank.read(&place), encoded(dtype, &expected), "type {dtype}, operator {op}");
            }
        }
    });
}

#[test]
fn nothing_can_be_exchanged() {
    together(2, |rank| {
        assert_eq!(rank.all_gather(0, 0, 0), SUCCESS, "{}", last_error());
        assert_eq!(rank.all_reduce(0, 0, 0, F32, SUM), SUCCESS, "{}", last_error());
        group_start();
        assert_eq!(rank.send(0, 0, 1 - rank.rank), SUCCESS);
        assert_eq!(rank.recv(0, 0, 1 - rank.rank), SUCCESS);
        assert_eq!(group_end(), SUCCESS, "{}", last_error());
    });
}

#[test]
fn a_send_meets_its_receive() {
    together(2, |rank| {
        let buffer = rank.upload(&numbers(rank.rank, 5));
        let code = match rank.rank {
            0 => rank.send(rank.at(&buffer), 5, 1),
            _ => rank.recv(rank.at(&buffer), 5, 0),
        };
        assert_eq!(code, SUCCESS, "{}", last_error());
        assert_eq!(rank.read(&buffer), numbers(0, 5));
    });
}

/// Every rank sends a part to every rank, to itself too.
#[test]
fn all_to_all_by_a_group() {
    for size in [1, 2, 3, 4] {
        together(size, |rank| {
            let count = 33;
            let from = rank.upload(&numbers(rank.rank, size * count));
            let to = rank.upload(&vec![-1.0f32; size * count]);
            group_start();
            for peer in 0..size {
                let part = (4 * peer * count) as u64;
                assert_eq!(rank.send(rank.at(&from) + part, count, peer), SUCCESS, "{}", last_error());
                assert_eq!(rank.recv(rank.at(&to) + part, count, peer), SUCCESS, "{}", last_error());
            }
            assert_eq!(group_end(), SUCCESS, "{}", last_error());
            let own = rank.rank * count;
            let expected: Vec<f32> =
                (0..size).flat_map(|peer| numbers(peer, size * count)[own..][..count].to_vec()).collect();
            assert_eq!(rank.read(&to), expected);
        });
    }
}

/// Several sends to one rank arrive in their order, however they are grouped there; the others need not take part.
#[test]
fn sends_arrive_in_order() {
    together(3, |rank| {
        let buffer = rank.upload(&numbers(rank.rank, 6));
        let at = |i: u64| rank.at(&buffer) + 4 * i;
        match rank.rank {
            0 => {
                group_start();
                for i in 0..6 {
                    assert_eq!(rank.send(at(i), 1, 2), SUCCESS);
                }
                assert_eq!(group_end(), SUCCESS, "{}", last_error());
            }
            1 => {}
            _ => {
                // The last first: 5 in place 0.
                for i in (1..6).rev() {
                    assert_eq!(rank.recv(at(i), 1, 0), SUCCESS, "{}", last_error());
                }
                assert_eq!(rank.recv(at(0), 1, 0), SUCCESS, "{}", last_error());
                assert_eq!(rank.read(&buffer), [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]);
            }
        }
    });
}

#[test]
fn a_group_of_many_kinds() {
    together(2, |rank| {
        let other = 1 - rank.rank;
        let (a, b) = (rank.upload(&numbers(rank.rank, 4)), rank.upload(&[1.0f32; 3]));
        let (to_a, to_b) = (rank.upload(&[0.0f32; 8]), rank.upload(&[0.0f32; 3]));
        let ring = rank.upload(&[0.0f32; 4]);
        group_start();
        group_start();
        assert_eq!(rank.all_gather(rank.at(&a), rank.at(&to_a), 4), SUCCESS);
        assert_eq!(rank.send(rank.at(&a), 4, other), SUCCESS);
        assert_eq!(group_end(), SUCCESS);
        assert_eq!(rank.all_reduce(rank.at(&b), rank.at(&to_b), 3, F32, SUM), SUCCESS);
        assert_eq!(rank.recv(rank.at(&ring), 4, other), SUCCESS);
        assert_eq!(group_end(), SUCCESS, "{}", last_error());
        assert_eq!(rank.read(&to_a), [numbers(0, 4), numbers(1, 4)].concat());
        assert_eq!(rank.read(&to_b), [2.0; 3]);
        assert_eq!(rank.read(&ring), numbers(other, 4));
    });
}

/// One thread has all ranks: communicators of ncclCommInitAll, and calls of all of them in groups.
#[test]
fn one_thread_with_all_ranks() {
    let nccl = nccl();
    let mut comms = [std::ptr::null_mut(); 3];
    assert_eq!(unsafe { (nccl.init_all)(comms.as_mut_ptr(), 3, [2, 0, 3].as_ptr()) }, SUCCESS, "{}", last_error());
    let ranks: Vec<Rank> = (comms.iter().zip([2, 0, 3]).enumerate())
        .map(|(rank, (&comm, device))| {
            let context = CudaContext::new(device).unwrap();
            unsafe { context.disable_event_tracking() };
            let stream = context.new_stream().unwrap();
            Rank { rank, size: 3, context, stream, comm, ended: false.into() }
        })
        .collect();
    let buffers: Vec<_> = ranks.iter().map(|rank| rank.upload(&numbers(rank.rank, 10))).collect();
    group_start();
    for (rank, buffer) in ranks.iter().zip(&buffers) {
        assert_eq!(rank.all_reduce(rank.at(buffer), rank.at(buffer), 10, F32, SUM), SUCCESS, "{}", last_error());
    }
    assert_eq!(group_end(), SUCCESS, "{}", last_error());
    for (rank, buffer) in ranks.iter().zip(&buffers) {
        rank.context.bind_to_thread().unwrap();
        assert_eq!(rank.read(buffer), (0..10).map(|i| (300 + 3 * i) as f32).collect::<Vec<_>>());
        let mut device = -1;
        assert_eq!(unsafe { (nccl.cu_device)(rank.comm, &mut device) }, SUCCESS);
        assert_eq!(device, [2, 0, 3][rank.rank]);
    }
    // Communicators of one thread by a group, on the same contexts.
    let id = unique_id();
    let mut second = [std::ptr::null_mut(); 2];
    group_start();
    for (rank, place) in second.iter_mut().enumerate() {
        ranks[rank].context.bind_to_thread().unwrap();
        assert_eq!(unsafe { (nccl.init_rank)(place, 2, id, rank as c_int) }, SUCCESS, "{}", last_error());
    }
    assert_eq!(group_end(), SUCCESS, "{}", last_error());
    // A call of both.
    let of_second = |rank: usize| {
        let (buffer, stream) = (ranks[rank].at(&buffers[rank]), ranks[rank].stream.cu_stream());
        unsafe { (nccl.broadcast)(buffer, buffer, 10, F32, 1, second[rank], stream) }
    };
    group_start();
    assert_eq!(of_second(0), SUCCESS, "{}", last_error());
    assert_eq!(of_second(1), SUCCESS, "{}", last_error());
    assert_eq!(group_end(), SUCCESS, "{}", last_error());
    for comm in second {
        assert_eq!(unsafe { (nccl.destroy)(comm) }, SUCCESS, "{}", last_error());
    }
    drop(buffers);
    ranks.iter().for_each(Rank::close);
    assert_eq!(unsafe { (nccl.destroy)(std::ptr::null_mut()) }, SUCCESS);
    assert_eq!(unsafe { (nccl.abort)(std::ptr::null_mut()) }, SUCCESS);
}

/// A graph exchanges what is in its buffers when it is launched, and is made of copies, fills and a host function.
#[test]
fn graphs_exchange_anew() {
    together(2, |rank| {
        let other = 1 - rank.rank;
        let from = rank.upload(&[0.0f32; 4]);
        let (gathered, summed) = (rank.upload(&[0.0f32; 8]), rank.upload(&[0.0f32; 2]));
        let graph = rank.capture(|| {
            assert_eq!(rank.all_gather(rank.at(&from), rank.at(&gathered), 4), SUCCESS, "{}", last_error());
            group_start();
            assert_eq!(rank.send(rank.at(&from), 2, other), SUCCESS);
            assert_eq!(rank.recv(rank.at(&summed), 2, other), SUCCESS);
            assert_eq!(group_end(), SUCCESS, "{}", last_error());
        });
        let (mut count, mut kinds) = (64, Vec::new());
        let mut nodes = [std::ptr::null_mut(); 64];
        ok(unsafe { sys::cuGraphGetNodes(graph.cu_graph(), nodes.as_mut_ptr(), &mut count) });
        for &node in &nodes[..count] {
            let mut kind = sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_EMPTY;
            ok(unsafe { sys::cuGraphNodeGetType(node, &mut kind) });
            kinds.push(kind as c_int);
        }
        // A copy, a fill, a host function, a copy, twice.
        assert_eq!(kinds, [1, 2, 3, 1, 1, 2, 3, 1]);
        assert_eq!(rank.read(&gathered), [0.0; 8], "a capture runs nothing");
        for round in 0..3 {
            let own: Vec<f32> = numbers(rank.rank, 4).iter().map(|x| x + 1000.0 * round as f32).collect();
            let theirs: Vec<f32> = numbers(other, 4).iter().map(|x| x + 1000.0 * round as f32).collect();
            let new = rank.upload(&own);
            ok(unsafe { sys::cuMemcpyDtoDAsync_v2(rank.at(&from), rank.at(&new), 16, rank.stream.cu_stream()) });
            graph.launch().unwrap();
            let both = if rank.rank == 0 { [own, theirs.clone()] } else { [theirs.clone(), own] };
            assert_eq!(rank.read(&gathered), both.concat());
            assert_eq!(rank.read(&summed), theirs[..2]);
            // A call outside between two launches.
            assert_eq!(rank.broadcast(rank.at(&from), rank.at(&from), 4, 0), SUCCESS, "{}", last_error());
        }
        drop(graph);
    });
}

#[test]
fn communicators_that_do_not_block() {
    let id = unique_id();
    // Rank 0 must see that it has to wait.
    let arrives = Barrier::new(2);
    threads(2, |number| {
        let nccl = nccl();
        if number == 1 {
            arrives.wait();
        }
        let (rank, code) = Rank::open_as(number, 2, id, 0);
        assert_eq!(code, IN_PROGRESS, "{}", last_error());
        if number == 0 {
            assert_eq!(rank.status(), IN_PROGRESS, "rank 1 is not there");
            let mut count = 0;
            refused(unsafe { (nccl.count)(rank.comm, &mut count) }, ARGUMENT, "while ncclCommInitRank is in progress");
            arrives.wait();
        }
        assert_eq!(rank.settled(), SUCCESS, "{}", last_error_of(rank.comm));
        let buffer = rank.upload(&numbers(number, 3));
        for round in 1..=3 {
            let code = rank.all_reduce(rank.at(&buffer), rank.at(&buffer), 3, F32, SUM);
            assert_eq!(code, IN_PROGRESS, "{}", last_error());
            assert_eq!(rank.settled(), SUCCESS, "{}", last_error_of(rank.comm));
            let sum = |x: f32| (1 << (round - 1)) as f32 * x;
            assert_eq!(rank.read(&buffer), [sum(100.0), sum(102.0), sum(104.0)]);
        }
        group_start();
        assert_eq!(rank.send(rank.at(&buffer), 1, 1 - number), SUCCESS);
        let other = rank.upload(&[0.0f32]);
        assert_eq!(rank.recv(rank.at(&other), 1, 1 - number), SUCCESS);
        assert_eq!(group_end(), IN_PROGRESS, "{}", last_error());
        assert_eq!(rank.settled(), SUCCESS, "{}", last_error_of(rank.comm));
        assert_eq!(rank.read(&other), [400.0]);
        assert_eq!(unsafe { (nccl.finalize)(rank.comm) }, IN_PROGRESS, "{}", last_error());
        assert_eq!(rank.settled(), SUCCESS, "{}", last_error_of(rank.comm));
        rank.close();
    });
}

#[test]
fn a_blocking_communicator_is_finalised_and_destroyed() {
    together(2, |rank| {
        let buffer = rank.upload(&numbers(rank.rank, 3));
        assert_eq!(rank.broadcast(rank.at(&buffer), rank.at(&buffer), 3, 0), SUCCESS, "{}", last_error());
        assert_eq!(unsafe { (nccl().finalize)(rank.comm) }, SUCCESS, "{}", last_error());
        assert_eq!(rank.status(), SUCCESS);
    });
}

/// Calls on another stream wait for those before, on every rank in the same order.
#[test]
fn streams_in_turn() {
    together(2, |rank| {
        let second = rank.context.new_stream().unwrap();
        let buffer = rank.upload(&numbers(rank.rank, 2));
        for round in 0..4 {
            let stream = if round % 2 == 0 { &rank.stream } else { &second };
            let (at, handle) = (rank.at(&buffer), stream.cu_stream());
            let code = unsafe { (nccl().all_reduce)(at, at, 2, F32, SUM, rank.comm, handle) };
            assert_eq!(code, SUCCESS, "{}", last_error());
        }
        second.synchronize().unwrap();
        assert_eq!(rank.read(&buffer), [800.0, 816.0]);
    });
}

/// Two communicators of the same ranks, used in turn.
#[test]
fn two_communicators() {
    let (one, other) = (unique_id(), unique_id());
    threads(2, |number| {
        let first = Rank::open(number, 2, one);
        let mut comm = std::ptr::null_mut();
        assert_eq!(
            unsafe { (nccl().init_rank)(&mut comm, 2, other, 1 - number as c_int) },
            SUCCESS,
            "{}",
            last_error()
        );
        let buffer = first.upload(&numbers(number, 2));
        let (at, stream) = (first.at(&buffer), first.stream.cu_stream());
        // Rank 0 of the first is the root, then rank 0 of the second, which is rank 1 of the first.
        assert_eq!(first.broadcast(at, at, 1, 0), SUCCESS, "{}", last_error());
        assert_eq!(unsafe { (nccl().broadcast)(at + 4, at + 4, 1, F32, 0, comm, stream) }, SUCCESS, "{}", last_error());
        assert_eq!(first.read(&buffer), [0.0, 101.0]);
        assert_eq!(unsafe { (nccl().destroy)(comm) }, SUCCESS, "{}", last_error());
        first.close();
    });
}
