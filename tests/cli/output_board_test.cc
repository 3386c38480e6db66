#include "cli/output_board.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <string>
#include <vector>

namespace lockstep {
namespace {

// As much of a terminal as the board asks of one.
class Screen {
 public:
  void Write(const std::string& bytes) {
    for (size_t i = 0; i < bytes.size(); ++i) {
      if (bytes[i] == '\n') {
        if (++row_ == lines_.size()) lines_.emplace_back();
        column_ = 0;
      } else if (bytes[i] == '\033') {
        const size_t end = bytes.find_first_of("AJK", i);
        ASSERT_NE(end, std::string::npos) << "an escape sequence that is not whole";
        Escape(bytes[end], std::atoi(bytes.c_str() + i + 2));
        i = end;
      } else {
        lines_[row_].resize(column_, ' ');
        lines_[row_] += bytes[i];
        ++column_;
      }
    }
  }
  const std::vector<std::string>& lines() const { return lines_; }

 private:
  void Escape(char what, int count) {
    if (what == 'A') {
      ASSERT_LE(static_cast<size_t>(count), row_) << "above the first line";
      row_ -= static_cast<size_t>(count);
    } else if (what == 'J') {
      ASSERT_EQ(column_, 0u);
      lines_.resize(row_ + 1);
      lines_[row_].clear();
    } else {
      FAIL() << "the board erases whole lines alone";
    }
  }

  std::vector<std::string> lines_ = {""};
  size_t row_ = 0, column_ = 0;
};

using Lines = std::vector<std::string>;

TEST(OutputBoard, PassesWholeLinesOnAsTheyAre) {
  OutputBoard board(2);
  EXPECT_EQ(board.Feed(0, "one\ntwo\n", 80), "one\ntwo\n");
  EXPECT_EQ(board.Feed(1, "crlf\r\n\n", 80), "crlf\n\n");
  EXPECT_EQ(board.Hide(), "") << "nothing is in the way";
}

TEST(OutputBoard, KeepsHalfALineUntilItsEndComes) {
  OutputBoard board(2);
  EXPECT_EQ(board.Feed(0, "half of ", 80), "");
  EXPECT_EQ(board.Feed(1, "another\n", 80), "another\n");
  EXPECT_EQ(board.Feed(0, "a line\n", 80), "half of a line\n");
}

TEST(OutputBoard, EveryBarHasItsOwnLine) {
  OutputBoard board(3);
  Screen screen;
  screen.Write(board.Feed(0, "\rrank 0 1 %\033[K", 80));
  screen.Write(board.Feed(2, "\rrank 2 1 %\033[K", 80));
  screen.Write(board.Feed(1, "\rrank 1 1 %\033[K", 80));
  EXPECT_EQ(screen.lines(), (Lines{"rank 0 1 %", "rank 1 1 %", "rank 2 1 %", ""}));
  screen.Write(board.Feed(2, "\rrank 2 50 %\033[K\rrank 2 70 %\033[K", 80));
  screen.Write(board.Feed(0, "\rrank 0 9 %\033[K", 80));
  EXPECT_EQ(screen.lines(), (Lines{"rank 0 9 %", "rank 1 1 %", "rank 2 70 %", ""}));
}

TEST(OutputBoard, LinesScrollByAboveTheBars) {
  OutputBoard board(3);
  Screen screen;
  screen.Write(board.Feed(0, "\rrank 0 1 %", 80));
  screen.Write(board.Feed(1, "\rrank 1 1 %", 80));
  screen.Write(board.Feed(2, "a line of the coordinator\n", 80));
  EXPECT_EQ(screen.lines(), (Lines{"a line of the coordinator", "rank 0 1 %", "rank 1 1 %", ""}));
  screen.Write(board.Hide());
  screen.Write("a line of ours\n");
  screen.Write(board.Feed(1, "\rrank 1 2 %", 80));
  EXPECT_EQ(screen.lines(),
            (Lines{"a line of the coordinator", "a line of ours", "rank 0 1 %", "rank 1 2 %", ""}));
}

TEST(OutputBoard, ABarThatEndsStaysAsALine) {
  OutputBoard board(2);
  Screen screen;
  screen.Write(board.Feed(0, "\rrank 0 60 %", 80));
  screen.Write(board.Feed(1, "\rrank 1 50 %", 80));
  screen.Write(board.Feed(1, "\rrank 1 100 %\033[K\nready\n", 80));
  EXPECT_EQ(screen.lines(), (Lines{"rank 1 100 %", "ready", "rank 0 60 %", ""}));
  screen.Write(board.Feed(0, "\rrank 0 100 %\n", 80));
  EXPECT_EQ(screen.lines(), (Lines{"rank 1 100 %", "ready", "rank 0 100 %", ""}));
  EXPECT_EQ(board.Feed(0, "next\n", 80), "next\n") << "nothing stands any more";
}

TEST(OutputBoard, ALineOfTheBarsOwnProcessTakesItsPlaceUntilItIsDrawnAgain) {
  OutputBoard board(2);
  Screen screen;
  screen.Write(board.Feed(0, "\rrank 0 60 %\033[K\r", 80));
  screen.Write(board.Feed(1, "\rrank 1 50 %\033[K\r", 80));
  EXPECT_EQ(screen.lines(), (Lines{"rank 0 60 %", "rank 1 50 %", ""}));
  screen.Write(board.Feed(0, "closed\n", 80));
  EXPECT_EQ(screen.lines(), (Lines{"closed", "rank 1 50 %", ""}));
  screen.Write(board.Feed(0, "\rrank 0 5 %\033[K\r", 80));
  EXPECT_EQ(screen.lines(), (Lines{"closed", "rank 0 5 %", "rank 1 50 %", ""}));
}

TEST(OutputBoard, AProcessThatEndsLeavesWhatItHadBegun) {
  OutputBoard board(2);
  Screen screen;
  screen.Write(board.Feed(0, "\rrank 0 60 %", 80));
  screen.Write(board.Feed(1, "no newli", 80));
  screen.Write(board.Close(0, 80));
  screen.Write(board.Close(1, 80));
  EXPECT_EQ(screen.lines(), (Lines{"rank 0 60 %", "no newli", ""}));
  EXPECT_EQ(board.Close(1, 80), "");
  screen.Write(board.Feed(0, "\rrank 0 1 %", 80));  // its next life
  EXPECT_EQ(screen.lines(), (Lines{"rank 0 60 %", "no newli", "rank 0 1 %", ""}));
}

TEST(OutputBoard, ABarIsNeverWiderThanTheTerminal) {
  OutputBoard board(1);
  Screen screen;
  screen.Write(board.Feed(0, "\r123456789", 8));
  EXPECT_EQ(screen.lines(), (Lines{"1234567", ""}));
  screen.Write(board.Feed(0, "\r12345\u00e9\u00e9", 8));
  EXPECT_EQ(screen.lines(), (Lines{"12345\u00e9", ""}));
  screen.Write(board.Feed(0, "\r123456\u00e9", 8));
  EXPECT_EQ(screen.lines(), (Lines{"123456", ""})) << "no half of a character";
  screen.Write(board.Feed(0, "\r123456789\n", 8));
  EXPECT_EQ(screen.lines(), (Lines{"123456789", ""})) << "a line that stays is whole";
}

TEST(OutputBoard, TheSameWhereverTheBytesAreCut) {
  const std::string bytes = "first\n\rrank 0 10 %\033[K\rrank 0 9 %\033[K\nlast\n\rbar";
  for (size_t cut = 0; cut <= bytes.size(); ++cut) {
    OutputBoard board(1);
    Screen screen;
    screen.Write(board.Feed(0, bytes.substr(0, cut), 80));
    screen.Write(board.Feed(0, bytes.substr(cut), 80));
    EXPECT_EQ(screen.lines(), (Lines{"first", "rank 0 9 %", "last", "bar", ""})) << cut;
  }
}

TEST(OutputBoard, ALineWithoutEndIsPassedOnInPieces) {
  OutputBoard board(1);
  const std::string line(OutputBoard::kMaxLineBytes, 'x');
  EXPECT_EQ(board.Feed(0, line, 80), "");
  EXPECT_EQ(board.Feed(0, "y", 80), line + "\n");
  EXPECT_EQ(board.Feed(0, "\n", 80), "y\n");
}

}  // namespace
}  // namespace lockstep
