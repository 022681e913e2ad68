//! Which calls of the ranks belong together, and what comes of them. No sockets and no threads: the hub hands in each
//! rank's batches and gets back what to answer.
//!
//! A rank has at most one batch, the calls of one group, under way. Collective calls belong together by their order,
//! sends and receives by their order between two ranks, as NCCL pairs them. So everything that can still happen is
//! visible here: if every rank waits, none of them ever goes on.

use crate::call::{Call, Kind, both};
use crate::codes::{Answer, Code, refuse};
use crate::sum;

pub struct Matching {
    ranks: Vec<Rank>,
    seed: u64,
    /// Collective calls carried out so far.
    collectives: u64,
}

#[derive(Default)]
struct Rank {
    batch: Option<Batch>,
    /// It makes no more calls.
    ended: bool,
}

/// Calls under way.
struct Batch {
    calls: Vec<Call>,
    /// What each gives away.
    data: Vec<Vec<u8>>,
    /// What each gets, once it is carried out.
    results: Vec<Option<Vec<u8>>>,
}

/// Ranks whose batches are carried out, with what their calls get, one behind the other.
pub type Done = Vec<(u32, Vec<u8>)>;

impl Matching {
    /// For `size` ranks. The seed draws the order of additions.
    pub fn new(size: u32, seed: u64) -> Matching {
        Matching { ranks: (0..size).map(|_| Rank::default()).collect(), seed, collectives: 0 }
    }

    /// A rank asks for the calls of a batch.
    pub fn submit(&mut self, rank: u32, calls: Vec<(Call, Vec<u8>)>) -> Answer<Done> {
        let (calls, data): (Vec<Call>, Vec<Vec<u8>>) = calls.into_iter().unzip();
        let results = calls.iter().map(|_| None).collect();
        let size = self.ranks.len() as u32;
        for (call, data) in calls.iter().zip(&data) {
            let wrong = call.other >= size || call.sends(rank, size) != Some(data.len() as u64);
            if wrong || call.receives(rank, size).is_none() {
                return refuse(Code::INTERNAL, format!("rank {rank} {} with {} bytes", call.words(), data.len()));
            }
        }
        let before = self.ranks[rank as usize].batch.replace(Batch { calls, data, results });
        if before.is_some() {
            return refuse(Code::INTERNAL, format!("rank {rank} makes a call before its last one is over"));
        }
        while self.collect()? || self.pair()? {}
        let mut done = Vec::new();
        for (rank, state) in self.ranks.iter_mut().enumerate() {
            let over = state.batch.take_if(|batch| batch.results.iter().all(Option::is_some));
            if let Some(batch) = over {
                done.push((rank as u32, batch.results.into_iter().flatten().flatten().collect()));
            }
        }
        self.refuse_to_wait_for_ever()?;
        Ok(done)
    }

    /// A rank makes no more calls.
    pub fn end(&mut self, rank: u32) -> Answer {
        self.ranks[rank as usize].ended = true;
        self.refuse_to_wait_for_ever()
    }

    /// The first call of a rank that is not carried out and that `which` accepts: its place in the batch.
    fn first(&self, rank: u32, which: impl Fn(&Call) -> bool) -> Option<(usize, &Call)> {
        let batch = self.ranks[rank as usize].batch.as_ref()?;
        batch.calls.iter().enumerate().find(|(at, call)| batch.results[*at].is_none() && which(call))
    }

    fn all(&self) -> std::ops::Range<u32> {
        0..self.ranks.len() as u32
    }

    /// Takes what a call gives away.
    fn take(&mut self, rank: u32, at: usize) -> Vec<u8> {
        let batch = self.ranks[rank as usize].batch.as_mut().expect("it has a call under way");
        std::mem::take(&mut batch.data[at])
    }

    /// A call is carried out.
    fn settle(&mut self, rank: u32, at: usize, result: Vec<u8>) {
        let batch = self.ranks[rank as usize].batch.as_mut().expect("it has a call under way");
        batch.results[at] = Some(result);
    }

    /// Carries out the next collective call if all ranks have come to it; false if they have not. Refuses calls that
    /// are not one.
    fn collect(&mut self) -> Answer<bool> {
        let next = |rank| self.first(rank, |call| call.kind.is_collective()).map(|(at, call)| (rank, at, *call));
        let there: Vec<(u32, usize, Call)> = self.all().filter_map(next).collect();
        let Some(&(first, _, call)) = there.first() else { return Ok(false) };
        if let Some((rank, _, other)) = there.iter().find(|(.., other)| !call.agrees(other)) {
            return refuse(Code::USAGE, both((first, &call), (*rank, other)));
        }
        if there.len() < self.ranks.len() {
            return Ok(false);
        }
        let data: Vec<Vec<u8>> = there.iter().map(|&(rank, at, _)| self.take(rank, at)).collect();
        let draw = self.seed ^ self.collectives.wrapping_mul(0xd129_0cba_8b5e_3d4d);
        self.collectives += 1;
        let slices: Vec<&[u8]> = data.iter().map(Vec::as_slice).collect();
        let joined = match call.kind {
            Kind::AllGather => data.concat(),
            Kind::Broadcast => data[call.other as usize].clone(),
            _ => sum::reduce(&slices, call.dtype, call.op, draw),
        };
        for (rank, at, _) in there {
            let result = match call.kind {
                Kind::Reduce if rank != call.other => Vec::new(),
                Kind::ReduceScatter => {
                    let part = joined.len() / self.ranks.len();
                    joined[rank as usize * part..][..part].to_vec()
                }
                _ => joined.clone(),
            };
            self.settle(rank, at, result);
        }
        Ok(true)
    }

    /// Carries out sends with their receives; false if there are none. Refuses pairs that differ.
    fn pair(&mut self) -> Answer<bool> {
        let mut moved = false;
        for from in self.all() {
            for to in self.all() {
                loop {
                    let send = self.first(from, |call| call.kind == Kind::Send && call.other == to);
                    let receive = self.first(to, |call| call.kind == Kind::Recv && call.other == from);
                    let (Some((at, send)), Some((to_at, receive))) = (send, receive) else { break };
                    if !send.pairs(receive) {
                        return refuse(Code::USAGE, both((from, send), (to, receive)));
                    }
                    let data = self.take(from, at);
                    self.settle(from, at, Vec::new());
                    self.settle(to, to_at, data);
                    moved = true;
                }
            }
        }
        Ok(moved)
    }

    /// Refuses a call that needs a rank which makes no more calls, and a state in which every rank waits.
    fn refuse_to_wait_for_ever(&self) -> Answer {
        let waiting: Vec<(u32, &Call)> =
            self.all().filter_map(|rank| self.first(rank, |_| true).map(|(_, call)| (rank, call))).collect();
        for (rank, state) in self.ranks.iter().enumerate().filter(|(_, state)| state.ended) {
            let needs = |call: &Call| call.kind.is_collective() || call.other == rank as u32;
            for waits in self.all().filter(|&waits| waits != rank as u32) {
                if let Some((_, call)) = self.first(waits, needs) {
                    let (asked, number) = (call.words(), call.number);
                    let what = format!("rank {waits} {asked} in its call {number}, but rank {rank} has ended its part");
                    return refuse(Code::USAGE, what);
                }
            }
            debug_assert!(state.batch.is_none(), "rank {rank} has ended in the middle of a call");
        }
        if waiting.is_empty() || waiting.len() < self.ranks.iter().filter(|state| !state.ended).count() {
            return Ok(());
        }
        // Collective calls that agree have been carried out, so that not all can be waiting in one.
        let of = |collective| waiting.iter().find(|(_, call)| call.kind.is_collective() == collective);
        if let (Some(&one), Some(&other)) = (of(true), of(false)) {
            return refuse(Code::USAGE, format!("{}, and all ranks wait", both(one, other)));
        }
        let said = |(rank, call): &(u32, &Call)| format!("rank {rank} {} in its call {}", call.words(), call.number);
        let said: Vec<String> = waiting.iter().map(said).collect();
        refuse(
            Code::USAGE,
            format!(
                "all ranks wait: {}; sends and receives that wait for each other belong in one group",
                said.join(", ")
            ),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::tests::plain;
    use crate::call::{Op, Type};

    fn bytes(numbers: &[f32]) -> Vec<u8> {
        numbers.iter().flat_map(|x| x.to_le_bytes()).collect()
    }

    fn send(number: u64, to: u32, numbers: &[f32]) -> (Call, Vec<u8>) {
        (Call { other: to, ..plain(number, Kind::Send, numbers.len() as u64) }, bytes(numbers))
    }

    fn receive(number: u64, from: u32, count: u64) -> (Call, Vec<u8>) {
        (Call { other: from, ..plain(number, Kind::Recv, count) }, Vec::new())
    }

    fn gather(number: u64, numbers: &[f32]) -> (Call, Vec<u8>) {
        (plain(number, Kind::AllGather, numbers.len() as u64), bytes(numbers))
    }

    fn refused(answer: Answer<Done>) -> String {
        let refusal = answer.expect_err("it is refused");
        assert_eq!(refusal.code, Code::USAGE, "{}", refusal.message);
        refusal.message
    }

    #[test]
    fn collective_calls_are_carried_out_when_all_are_there() {
        let mut ranks = Matching::new(3, 0);
        assert_eq!(ranks.submit(2, vec![gather(1, &[5.0])]), Ok(vec![]));
        assert_eq!(ranks.submit(0, vec![gather(1, &[3.0])]), Ok(vec![]));
        let all = bytes(&[3.0, 4.0, 5.0]);
        assert_eq!(ranks.submit(1, vec![gather(1, &[4.0])]), Ok(vec![(0, all.clone()), (1, all.clone()), (2, all)]));
        let of = |kind, rank: u32, other| {
            let numbers = if kind == Kind::Broadcast && rank != other { vec![] } else { vec![1.0, 2.0, 4.0] };
            let count = if kind == Kind::ReduceScatter { 1 } else { 3 };
            (Call { other, ..plain(2, kind, count) }, bytes(&numbers))
        };
        for (kind, root, expected) in [
            (Kind::Broadcast, 1, [bytes(&[1.0, 2.0, 4.0]), bytes(&[1.0, 2.0, 4.0]), bytes(&[1.0, 2.0, 4.0])]),
            (Kind::Reduce, 2, [vec![], vec![], bytes(&[3.0, 6.0, 12.0])]),
            (Kind::AllReduce, 0, [bytes(&[3.0, 6.0, 12.0]), bytes(&[3.0, 6.0, 12.0]), bytes(&[3.0, 6.0, 12.0])]),
            (Kind::ReduceScatter, 0, [bytes(&[3.0]), bytes(&[6.0]), bytes(&[12.0])]),
        ] {
            assert_eq!(ranks.submit(0, vec![of(kind, 0, root)]), Ok(vec![]), "{kind:?}");
            assert_eq!(ranks.submit(1, vec![of(kind, 1, root)]), Ok(vec![]), "{kind:?}");
            let done = ranks.submit(2, vec![of(kind, 2, root)]).unwrap();
            assert_eq!(done, (0..).zip(expected).collect::<Done>(), "{kind:?}");
        }
    }

    #[test]
    fn sends_and_receives_are_paired_in_order() {
        let mut ranks = Matching::new(2, 0);
        // Both of a group at one end, one after the other at the other end.
        assert_eq!(ranks.submit(0, vec![send(1, 1, &[1.0]), send(2, 1, &[2.0, 3.0])]), Ok(vec![]));
        assert_eq!(ranks.submit(1, vec![receive(1, 0, 1)]), Ok(vec![(1, bytes(&[1.0]))]));
        assert_eq!(ranks.submit(1, vec![receive(2, 0, 2)]), Ok(vec![(0, vec![]), (1, bytes(&[2.0, 3.0]))]));
        // All to all, to oneself too.
        let batch = |rank: u32| {
            let x = rank as f32;
            vec![send(3, 0, &[x]), receive(4, 0, 1), send(5, 1, &[10.0 + x]), receive(6, 1, 1)]
        };
        assert_eq!(ranks.submit(1, batch(1)), Ok(vec![]));
        let expected = vec![(0, bytes(&[0.0, 1.0])), (1, bytes(&[10.0, 11.0]))];
        assert_eq!(ranks.submit(0, batch(0)), Ok(expected));
    }

    #[test]
    fn a_pair_may_talk_while_others_do_something_else() {
        let mut ranks = Matching::new(3, 0);
        assert_eq!(ranks.submit(2, vec![gather(1, &[1.0])]), Ok(vec![]));
        assert_eq!(ranks.submit(0, vec![send(1, 1, &[7.0])]), Ok(vec![]));
        assert_eq!(ranks.submit(1, vec![receive(1, 0, 1)]), Ok(vec![(0, vec![]), (1, bytes(&[7.0]))]));
        assert_eq!(ranks.submit(0, vec![gather(2, &[2.0])]), Ok(vec![]));
        assert_eq!(ranks.submit(1, vec![gather(2, &[3.0])]).unwrap().len(), 3);
    }

    #[test]
    fn calls_that_differ_are_refused_with_both_sides() {
        let with = |change: fn(&mut Call)| {
            let mut ranks = Matching::new(2, 0);
            assert_eq!(ranks.submit(0, vec![gather(41, &[1.0, 2.0])]), Ok(vec![]));
            let (mut call, data) = gather(41, &[1.0, 2.0]);
            change(&mut call);
            let data = data[..call.sends(1, 2).unwrap() as usize].to_vec();
            refused(ranks.submit(1, vec![(call, data)]))
        };
        assert_eq!(with(|call| call.count = 1), "call 41: rank 0 all-gathers 2 f32, rank 1 1 f32");
        assert_eq!(with(|call| call.dtype = Type::Bf16), "call 41: rank 0 all-gathers 2 f32, rank 1 2 bf16");
        let said = with(|call| call.kind = Kind::AllReduce);
        assert_eq!(said, "call 41: rank 0 all-gathers 2 f32, rank 1 all-reduces 2 f32 (sum)");
        let said = with(|call| call.captured = true);
        assert_eq!(said, "call 41: rank 0 all-gathers 2 f32 outside any graph, rank 1 2 f32 in a graph");
        let said = with(|call| (call.place, call.number) = ((1, 2), 40));
        assert!(said.ends_with("rank 1 2 f32 as number 1 of 2 collective calls of a group in its call 40"), "{said}");

        let pair = |change: fn(&mut Call)| {
            let mut ranks = Matching::new(3, 0);
            assert_eq!(ranks.submit(2, vec![send(4, 0, &[1.0, 2.0])]), Ok(vec![]));
            let (mut call, data) = receive(6, 2, 2);
            change(&mut call);
            refused(ranks.submit(0, vec![(call, data)]))
        };
        let said = pair(|call| call.count = 3);
        assert_eq!(said, "rank 2 sends 2 f32 to rank 0 in its call 4, rank 0 receives 3 f32 from rank 2 in its call 6");
        assert!(pair(|call| call.dtype = Type::I32).contains("rank 0 receives 2 i32 from rank 2"));
        assert!(pair(|call| call.captured = true).contains("from rank 2 in a graph"));
        let operations = |op| (Call { op, ..plain(1, Kind::AllReduce, 1) }, bytes(&[1.0]));
        let mut ranks = Matching::new(2, 0);
        assert_eq!(ranks.submit(1, vec![operations(Op::Max)]), Ok(vec![]));
        let said = refused(ranks.submit(0, vec![operations(Op::Min)]));
        assert_eq!(said, "call 1: rank 0 all-reduces 1 f32 (minimum), rank 1 1 f32 (maximum)");
    }

    #[test]
    fn what_can_never_go_on_is_refused() {
        let mut ranks = Matching::new(2, 0);
        assert_eq!(ranks.submit(0, vec![send(3, 1, &[1.0])]), Ok(vec![]));
        let said = refused(ranks.submit(1, vec![send(3, 0, &[1.0])]));
        assert_eq!(
            said,
            "all ranks wait: rank 0 sends 1 f32 to rank 1 in its call 3, rank 1 sends 1 f32 to rank 0 in its call 3; sends \
             and receives that wait for each other belong in one group"
        );
        let mut ranks = Matching::new(2, 0);
        assert_eq!(ranks.submit(1, vec![send(3, 0, &[1.0])]), Ok(vec![]));
        let said = refused(ranks.submit(0, vec![gather(3, &[1.0])]));
        assert_eq!(said, "call 3: rank 0 all-gathers 1 f32, rank 1 sends 1 f32 to rank 0, and all ranks wait");
        // A rank alone, which sends to itself and never receives.
        let said = refused(Matching::new(1, 0).submit(0, vec![send(1, 0, &[1.0])]));
        assert!(said.starts_with("all ranks wait: rank 0 sends 1 f32 to rank 0 in its call 1;"), "{said}");
    }

    #[test]
    fn calls_that_need_an_ended_rank_are_refused() {
        let mut ranks = Matching::new(3, 0);
        assert_eq!(ranks.submit(0, vec![send(3, 1, &[1.0])]), Ok(vec![]));
        let said = ranks.end(1).expect_err("rank 0 waits for it").message;
        assert_eq!(said, "rank 0 sends 1 f32 to rank 1 in its call 3, but rank 1 has ended its part");
        let mut ranks = Matching::new(3, 0);
        assert_eq!(ranks.end(1), Ok(()));
        assert_eq!(ranks.submit(0, vec![send(1, 2, &[1.0])]), Ok(vec![]));
        assert_eq!(ranks.submit(2, vec![receive(1, 0, 1)]).unwrap().len(), 2);
        let said = refused(ranks.submit(2, vec![gather(2, &[1.0])]));
        assert_eq!(said, "rank 2 all-gathers 1 f32 in its call 2, but rank 1 has ended its part");
    }

    #[test]
    fn the_order_of_additions_depends_on_the_seed_and_the_call() {
        let sums = |seed| {
            let mut ranks = Matching::new(3, seed);
            let mut sums = Vec::new();
            for number in 1..=16 {
                for (rank, x) in [1e8, -1e8, 1.0].into_iter().enumerate() {
                    let call = (plain(number, Kind::AllReduce, 1), bytes(&[x]));
                    sums.extend(ranks.submit(rank as u32, vec![call]).unwrap().into_iter().map(|(_, sum)| sum));
                }
            }
            assert!(sums.chunks(3).all(|all| all.iter().all(|sum| *sum == all[0])), "all ranks get the same bits");
            sums
        };
        assert_ne!(sums(1), sums(2));
        assert!(sums(1).contains(&bytes(&[0.0])) && sums(1).contains(&bytes(&[1.0])));
    }
}
